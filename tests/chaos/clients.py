"""The clients: they do what a case says, try again where they are told to, and keep the ledger."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.chaos.cases import Case, decoded
from tests.chaos.ledger import Entry, Ledger

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
PATIENCE_S = 300.0  # for one case; an outage is over long before
RETRY_S, LONGEST_RETRY_S = 0.2, 1.0
POLL_S = 0.1
BROKEN = "connection broken before an answer"
TERMINAL = frozenset({"succeeded", "failed", "cancelled", "expired"})


class Failed(Exception):
    """What the client was told, and should not have been."""


class Clients:
    """Any number of clients of the same servers.

    Args:
        urls: gives the servers as they are now; a client takes one, and another where that one is gone.
        patient: whether a 429 is a reason to try again, or the end.
    """

    def __init__(self, urls: Callable[[], list[str]], ledger: Ledger, *, patient: bool = True):
        self._urls, self._ledger, self._patient = urls, ledger, patient
        self._turn = itertools.count()
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(PATIENCE_S, connect=5.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def serve(self, case: Case) -> Entry:
        """Sees a case to its end, whatever that is."""
        entry = self._ledger.open(case)
        do = {"job": self._job, "cancelled": self._job, "twins": self._twins, "leaves": self._leave}
        try:
            async with asyncio.timeout(PATIENCE_S):
                outcome = await do.get(case.kind, self._pictures)(entry)
        except Failed as failure:
            outcome = str(failure)
        except TimeoutError:
            outcome = f"no end within {PATIENCE_S:.0f} s"
        except httpx.TransportError as error:
            outcome = f"the connection broke ({type(error).__name__})"
        self._ledger.close(entry, outcome)
        return entry

    # --- kinds --------------------------------------------------------------------------------------------------------

    async def _pictures(self, entry: Entry, headers: dict[str, str] | None = None) -> str:
        """Plain, stream or edit."""
        async with self._accepted(entry, headers or {}) as response:
            if response is None:
                return "refused"
            entry.pictures = await (_streamed(response, entry.case.n) if entry.case.streams else _answered(response))
        return "pictures"

    async def _leave(self, entry: Entry) -> str:
        asking = asyncio.create_task(self._pictures(entry))
        await asyncio.wait([asking], timeout=entry.case.moment * self._ledger.usual_s)
        if asking.done():
            return asking.result()
        entry.left_at = time.monotonic()
        asking.cancel()
        await asyncio.wait([asking])
        return "left"

    async def _twins(self, entry: Entry) -> str:
        headers = {"idempotency-key": entry.case.prompt}
        entries = [entry, *(Entry(entry.case) for _ in range(entry.case.copies - 1))]
        outcomes = await asyncio.gather(*(self._pictures(twin, headers) for twin in entries))
        if len({tuple(twin.pictures) for twin in entries}) > 1:
            raise Failed("the same key got different pictures")
        return outcomes[0]

    async def _job(self, entry: Entry) -> str:
        async with self._accepted(entry, {"prefer": "respond-async"}) as response:
            if response is None:
                return "refused"
            await response.aread()
            entry.job_id = response.json()["id"]
        url = f"/v1/jobs/{entry.job_id}"
        if entry.case.kind == "cancelled":
            await asyncio.sleep(entry.case.moment * self._ledger.usual_s)
            await self._asked(entry, "DELETE", url)
        elif entry.case.follows:
            await self._followed(entry, url)
        job = await self._asked(entry, "GET", url)
        while job["status"] not in TERMINAL:
            await asyncio.sleep(POLL_S)
            job = await self._asked(entry, "GET", url)
        if job["status"] == "cancelled" and entry.case.kind == "cancelled":
            return "cancelled"
        if job["status"] != "succeeded":
            raise Failed(f"the job has {job['status']}: {(job['error'] or {}).get('message')}")
        entry.pictures = [decoded(item) for item in job["result"]["data"]]
        return "pictures"

    async def _followed(self, entry: Entry, url: str) -> None:
        """Reads events until the last, or until the stream breaks: the job goes on either way."""
        async with self._http.stream("GET", self._server() + url + "/events") as response:
            if response.status_code == 200:
                try:
                    async for _ in response.aiter_lines():
                        pass
                except httpx.TransportError:
                    entry.told_to_retry["stream of a job broke"] += 1

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _accepted(self, entry: Entry, headers: dict[str, str]) -> AsyncIterator[httpx.Response | None]:
        """The answer of a server that took the case, its body unread; None if it was refused for good."""
        while True:
            began = time.monotonic()
            try:
                response = await self._http.send(self._request(entry.case, headers), stream=True)
            except httpx.TransportError as error:  # as the official SDK does, which tries again after any of them
                unconnected = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
                entry.told_to_retry["no connection" if unconnected else BROKEN] += 1
                await asyncio.sleep(RETRY_S)
                continue
            try:
                if response.status_code in (200, 202):
                    yield response
                    return
                await response.aread()
                if response.status_code in self._ledger.refusals:
                    self._ledger.refusals[response.status_code].append(time.monotonic() - began)
                if response.status_code == 429 and not self._patient:
                    yield None
                    return
            finally:
                await response.aclose()
            await self._told_off(entry, response)

    def _request(self, case: Case, headers: dict[str, str]) -> httpx.Request:
        if case.kind != "edit":
            return self._http.build_request("POST", self._server() + GENERATIONS, json=case.body, headers=headers)
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in case.body.items()}
        upload = {"image": ("picture.png", case.upload, "image/png")}
        return self._http.build_request("POST", self._server() + EDITS, data=texts, files=upload, headers=headers)

    async def _asked(self, entry: Entry, method: str, url: str) -> dict[str, Any]:
        """The JSON of a route that may be asked as often as it takes."""
        while True:
            try:
                response = await self._http.request(method, self._server() + url)
            except httpx.TransportError as error:
                entry.told_to_retry[type(error).__name__] += 1
                await asyncio.sleep(RETRY_S)
                continue
            if response.status_code == 200:
                return response.json()
            await self._told_off(entry, response)

    async def _told_off(self, entry: Entry, response: httpx.Response) -> None:
        """Waits as long as the answer says.

        Raises:
            Failed: it does not say that it would do to try again.
        """
        if response.status_code not in (429, 503):
            raise Failed(f"HTTP {response.status_code}: {_message(response)}")
        entry.told_to_retry[str(response.status_code)] += 1
        wait = min(LONGEST_RETRY_S, float(response.headers.get("retry-after", RETRY_S)))
        await asyncio.sleep(wait * random.uniform(0.5, 1.0))

    def _server(self) -> str:
        urls = self._urls()
        return urls[next(self._turn) % len(urls)]


async def _answered(response: httpx.Response) -> list[str]:
    await response.aread()
    return [decoded(item) for item in response.json()["data"]]


async def _streamed(response: httpx.Response, count: int) -> list[str]:
    pictures: list[str] = []
    name = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = json.loads(line.removeprefix("data: "))
            if "error" in data:
                raise Failed(f"in the stream: {data['error']['message']}")
            if name.endswith(".completed"):
                pictures.append(decoded(data))
    if len(pictures) < count:
        raise Failed(f"the stream ended after {len(pictures)} of {count} pictures")
    return pictures


def _message(response: httpx.Response) -> str:
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


class Load:
    """A number of clients that are always busy, until the cases are used up or nobody wants any more.

    Args:
        most: cases in all; None for as many as fit until `enough`.
    """

    def __init__(self, clients: Clients, cases: Iterator[Case], concurrency: int, most: int | None = None):
        self._clients = clients
        self._cases = itertools.islice(cases, most)
        self._concurrency = concurrency
        self._enough = False

    def enough(self) -> None:
        """Let what is under way end, and begin nothing new."""
        self._enough = True

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(self._client())

    async def _client(self) -> None:
        for case in self._cases:
            if self._enough:
                return
            await self._clients.serve(case)
