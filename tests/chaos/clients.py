"""Clients that send the requests of cases, retry where the server asks for it, and fill the ledger."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.chaos.cases import Case, image_digest
from tests.chaos.ledger import Entry, Ledger

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
CASE_TIMEOUT_S = 300.0  # an outage is much shorter
RETRY_S, LONGEST_RETRY_S = 0.2, 1.0
POLL_S = 0.1
BROKEN = "connection broken before a response"
TERMINAL = frozenset({"succeeded", "failed", "cancelled", "expired"})


class Failed(Exception):
    """A response that the client should not have got."""


class Clients:
    """Any number of clients of the same servers.

    Args:
        urls: returns the current servers, used in turn.
        retry_refused: whether to retry after a 429.
        key: API key.
    """

    def __init__(
        self, urls: Callable[[], list[str]], ledger: Ledger, *, retry_refused: bool = True, key: str | None = None
    ):
        self._urls, self._ledger, self._retry_refused = urls, ledger, retry_refused
        self._turn = itertools.count()
        self._http = httpx.AsyncClient(
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(CASE_TIMEOUT_S, connect=5.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def serve(self, case: Case) -> Entry:
        """Send the request of a case and record its outcome."""
        entry = self._ledger.open(case)
        methods = {"job": self._job, "cancelled": self._job, "twins": self._twins, "disconnects": self._disconnect}
        try:
            async with asyncio.timeout(CASE_TIMEOUT_S):
                outcome = await methods.get(case.kind, self._images)(entry)
        except Failed as failure:
            outcome = str(failure)
        except TimeoutError:
            outcome = f"no end within {CASE_TIMEOUT_S:.0f} s"
        except httpx.TransportError as error:
            outcome = f"the connection broke ({type(error).__name__})"
        self._ledger.close(entry, outcome)
        return entry

    # --- kinds --------------------------------------------------------------------------------------------------------

    async def _images(self, entry: Entry, headers: dict[str, str] | None = None) -> str:
        """Send a plain request, a stream or an edit."""
        async with self._accepted(entry, headers or {}) as response:
            if response is None:
                return "refused"
            entry.images = await (
                _stream_images(response, entry.case.n) if entry.case.streams else _read_images(response)
            )
        return "images"

    async def _disconnect(self, entry: Entry) -> str:
        request = asyncio.create_task(self._images(entry))
        await asyncio.wait([request], timeout=entry.case.moment * self._ledger.typical_s)
        if request.done():
            return request.result()
        entry.disconnected_at = time.monotonic()
        request.cancel()
        await asyncio.wait([request])
        return "disconnected"

    async def _twins(self, entry: Entry) -> str:
        headers = {"idempotency-key": entry.case.prompt}
        entries = [entry, *(Entry(entry.case) for _ in range(entry.case.copies - 1))]
        outcomes = await asyncio.gather(*(self._images(twin, headers) for twin in entries))
        if len({tuple(twin.images) for twin in entries}) > 1:
            raise Failed("the same key returned different images")
        return outcomes[0]

    async def _job(self, entry: Entry) -> str:
        async with self._accepted(entry, {"prefer": "respond-async"}) as response:
            if response is None:
                return "refused"
            await response.aread()
            entry.job_id = response.json()["id"]
        url = f"/v1/jobs/{entry.job_id}"
        if entry.case.kind == "cancelled":
            await asyncio.sleep(entry.case.moment * self._ledger.typical_s)
            await self._request_json(entry, "DELETE", url)
        elif entry.case.follows:
            await self._follow_events(entry, url)
        job = await self._request_json(entry, "GET", url)
        # A failover of Redis may forget an end between the reads of record and result: the job runs again.
        while job["status"] not in TERMINAL or (job["status"] == "succeeded" and job["result"] is None):
            await asyncio.sleep(POLL_S)
            job = await self._request_json(entry, "GET", url)
        if job["status"] == "cancelled" and entry.case.kind == "cancelled":
            return "cancelled"
        if job["status"] != "succeeded":
            raise Failed(f"the job is {job['status']}: {(job['error'] or {}).get('message')}")
        entry.images = [image_digest(item) for item in job["result"]["data"]]
        return "images"

    async def _follow_events(self, entry: Entry, url: str) -> None:
        """Read events until the last one or until the stream breaks; the job continues either way."""
        async with self._http.stream("GET", self._server() + url + "/events") as response:
            if response.status_code == 200:
                try:
                    async for _ in response.aiter_lines():
                        pass
                except httpx.TransportError:
                    entry.retries["broken stream of a job"] += 1

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _accepted(self, entry: Entry, headers: dict[str, str]) -> AsyncIterator[httpx.Response | None]:
        """Send the request until it is accepted and yield the response, its body unread; None if it was refused."""
        while True:
            began = time.monotonic()
            try:
                response = await self._http.send(self._request(entry.case, headers), stream=True)
            except httpx.TransportError as error:  # as the official SDK does, which retries after any of them
                unconnected = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
                entry.retries["no connection" if unconnected else BROKEN] += 1
                await asyncio.sleep(RETRY_S)
                continue
            try:
                if response.status_code in (200, 202):
                    yield response
                    return
                await response.aread()
                if response.status_code in self._ledger.refusals:
                    self._ledger.refusals[response.status_code].append(time.monotonic() - began)
                if response.status_code == 429 and not self._retry_refused:
                    yield None
                    return
            finally:
                await response.aclose()
            await self._wait_to_retry(entry, response)

    def _request(self, case: Case, headers: dict[str, str]) -> httpx.Request:
        if case.kind != "edit":
            return self._http.build_request("POST", self._server() + GENERATIONS, json=case.body, headers=headers)
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in case.body.items()}
        upload = {"image": ("image.png", case.upload, "image/png")}
        return self._http.build_request("POST", self._server() + EDITS, data=texts, files=upload, headers=headers)

    async def _request_json(self, entry: Entry, method: str, url: str) -> dict[str, Any]:
        """Return the JSON of an idempotent request, retried until it succeeds."""
        while True:
            try:
                response = await self._http.request(method, self._server() + url)
            except httpx.TransportError as error:
                entry.retries[type(error).__name__] += 1
                await asyncio.sleep(RETRY_S)
                continue
            if response.status_code == 200:
                return response.json()
            await self._wait_to_retry(entry, response)

    async def _wait_to_retry(self, entry: Entry, response: httpx.Response) -> None:
        """Wait as long as the response asks for.

        Raises:
            Failed: its status allows no retry.
        """
        if response.status_code not in (429, 503):
            raise Failed(f"HTTP {response.status_code}: {_message(response)}")
        entry.retries[str(response.status_code)] += 1
        wait = min(LONGEST_RETRY_S, float(response.headers.get("retry-after", RETRY_S)))
        await asyncio.sleep(wait * random.uniform(0.5, 1.0))

    def _server(self) -> str:
        urls = self._urls()
        return urls[next(self._turn) % len(urls)]


async def _read_images(response: httpx.Response) -> list[str]:
    await response.aread()
    return [image_digest(item) for item in response.json()["data"]]


async def _stream_images(response: httpx.Response, count: int) -> list[str]:
    images: list[str] = []
    name = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = json.loads(line.removeprefix("data: "))
            if "error" in data:
                raise Failed(f"error in the stream: {data['error']['message']}")
            if name.endswith(".completed"):
                images.append(image_digest(data))
    if len(images) < count:
        raise Failed(f"the stream ended after {len(images)} of {count} images")
    return images


def _message(response: httpx.Response) -> str:
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


class Load:
    """`concurrency` clients that are always busy, until `max_cases` are done (None: no limit) or `stop` is called."""

    def __init__(self, clients: Clients, cases: Iterator[Case], concurrency: int, max_cases: int | None = None):
        self._clients = clients
        self._cases = itertools.islice(cases, max_cases)
        self._concurrency = concurrency
        self._stopped = False

    def stop(self) -> None:
        """Start no new requests."""
        self._stopped = True

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(self._client())

    async def _client(self) -> None:
        for case in self._cases:
            if self._stopped:
                return
            await self._clients.serve(case)
