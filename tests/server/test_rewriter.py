"""The prompt rewriter with a real HTTP endpoint: its requests, the responses it accepts, and its failures."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from pydantic import ValidationError

from server.metrics import Metrics
from server.requests import prompt_rewriter as rewriter
from server.requests.prompt_rewriter import Rewriter, is_usable, open_rewriter
from server.settings import ServerSettings

PROMPT = "a shop sign that says 'OPEN'"
RICH = "A photograph of a wooden shop sign at dusk, lettered 'OPEN' in gold"


def completion(text: object) -> bytes:
    body = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class Endpoint:
    """A chat endpoint that sends one response, `delay_s` after the request; forever if `endless`."""

    def __init__(self, answer: bytes, *, delay_s: float = 0.0, endless: bool = False):
        self._answer, self._delay_s, self._endless = answer, delay_s, endless
        self.requests: list[tuple[str, dict[str, str], dict]] = []
        self.url = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            self.requests.append((head[0], headers, body))
            await asyncio.sleep(self._delay_s)
            writer.write(self._answer)
            while self._endless:
                writer.write(b" " * 65536)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(endpoint: Endpoint) -> AsyncIterator[Endpoint]:
    async with await asyncio.start_server(endpoint._serve, "127.0.0.1", 0) as server:
        endpoint.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        yield endpoint


@asynccontextmanager
async def asking(url: str, metrics: Metrics | None = None, **settings: str) -> AsyncIterator[Rewriter]:
    async with open_rewriter(
        ServerSettings(prompt_rewriter=url, **settings),  # type: ignore[arg-type]
        metrics or Metrics(),
    ) as opened:
        assert opened is not None
        yield opened


async def outcome_of(answer: bytes, prompt: str = PROMPT, **how: float | bool) -> tuple[str | None, str]:
    """Return the rewritten prompt for an endpoint's response, and the outcome that is counted."""
    metrics = Metrics()
    async with serving(Endpoint(answer, **how)) as endpoint, asking(endpoint.url, metrics) as opened:  # type: ignore[arg-type]
        rewritten = await opened.rewrite(prompt)
    counts = {
        sample.labels["outcome"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "glimmer_prompt_rewrites_total"
    }
    assert list(counts.values()) == [1]
    return rewritten, next(iter(counts))


async def test_the_request() -> None:
    async with (
        serving(Endpoint(completion(RICH))) as endpoint,
        asking(endpoint.url + "/", prompt_rewriter_key="s3cret", prompt_rewriter_model="glm-4.7") as opened,
    ):
        assert await opened.rewrite(PROMPT) == RICH
    ((line, headers, body),) = endpoint.requests
    assert line == "POST /v1/chat/completions HTTP/1.1"
    assert headers["authorization"] == "bearer s3cret"
    assert (body["model"], body["stream"]) == ("glm-4.7", False)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"] == PROMPT


async def test_the_request_without_key_and_model() -> None:
    async with serving(Endpoint(completion(RICH))) as endpoint, asking(endpoint.url) as opened:
        await opened.rewrite(PROMPT)
    ((_, headers, body),) = endpoint.requests
    assert "authorization" not in headers
    assert "model" not in body


async def test_no_proxy_is_used_for_an_endpoint_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert await outcome_of(completion(RICH)) == (RICH, "rewritten")


@pytest.mark.parametrize("text", [f"\n{RICH} \n", f"<think>a sign, 'OPEN'?</think>\n\n{RICH}"])
async def test_only_the_prompt_is_used(text: str) -> None:
    assert await outcome_of(completion(text)) == (RICH, "rewritten")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        PROMPT,
        "a wooden shop sign",
        "a sign that says 'Open'",
        "a sign that says 'OPEN' and again 'OPEN'",
        "a sign that says 'OPEN' above a \"CLOSED\" one",
        "the bird's sign says 'OPEN' and the cat's does not",
        RICH + "<|endoftext|>",
        RICH + "." * 5000,
        "<think>a sign that says 'OPEN', and",
    ],
)
async def test_unusable_responses_are_dropped(text: str) -> None:
    assert await outcome_of(completion(text)) == (None, "dropped")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 307 Temporary Redirect\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b'HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n{"choices": []}',
        b'HTTP/1.1 200 OK\r\ncontent-length: 17\r\n\r\n{"choices": null}',
        b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}",
        b"SSH-2.0-OpenSSH\r\n",
        b"",
        completion(None),
        completion(["a sign"]),
    ],
)
async def test_a_failing_endpoint_keeps_the_prompt(answer: bytes) -> None:
    assert await outcome_of(answer) == (None, "failed")


async def test_a_slow_endpoint_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rewriter.REWRITE_TIMEOUT_S == 5
    monkeypatch.setattr(rewriter, "REWRITE_TIMEOUT_S", 0.3)
    async with asyncio.timeout(3):
        assert await outcome_of(completion(RICH), delay_s=2) == (None, "failed")


async def test_an_endless_response_is_cut_off() -> None:
    head = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
    async with asyncio.timeout(4):  # before the timeout
        assert await outcome_of(head, endless=True) == (None, "failed")


async def test_an_unreachable_endpoint() -> None:
    async with asking("http://127.0.0.1:9/v1") as opened:
        assert await opened.rewrite(PROMPT) is None


async def test_failures_are_logged_without_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "glimmer")
    await outcome_of(b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n")
    await outcome_of(completion(["secret"]))
    lines = [record.getMessage() for record in caplog.records if record.name == "glimmer.rewriter"]
    assert lines == ["rewrite_failed error=HTTPStatusError status=500", "rewrite_failed error=TypeError"]


def test_quotes_are_parsed_as_in_the_renderer() -> None:
    prompt = "\"double\" 'single' \u201ccurly\u201d \u300ccorner\u300d"
    assert is_usable(prompt, f"a poster: {prompt}")
    assert is_usable(prompt, "\u300ccorner\u300d \u201ccurly\u201d, 'single' and \"double\" in another order")
    for text in ("double", "single", "curly", "corner"):
        assert not is_usable(prompt, f"a poster: {prompt.replace(text, 'other')}")
    assert not is_usable("a fox", "a fox \u300ccalled\u300d Reynard")
    assert is_usable("a fox", "a fox\u2019s tail, the bird\u2019s wings")


def test_a_long_prompt_may_stay_as_long_as_it_is() -> None:
    long = "a fox, " * 1000
    assert is_usable(long, "a red " + long[6:])
    assert not is_usable(long, long + ", red")


async def test_off_by_default() -> None:
    for settings in (ServerSettings(), ServerSettings(prompt_rewriter="")):
        async with open_rewriter(settings, Metrics()) as opened:
            assert opened is None


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://a/v1", "http://", "http://[::1", "http://a/v1/chat/completions"]
)
def test_invalid_base_urls_are_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="write it like http"):
        ServerSettings(prompt_rewriter=url)
