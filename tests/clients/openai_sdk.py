"""The official SDK for Python as one of the clients under test."""

import inspect
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path
from typing import Any

import openai

from tests.clients.client import Raised
from tests.server.conftest import LiveServer


class OpenAiPython:
    """The official SDK, told to check every answer against its own types. What a method has no argument for goes into
    `extra_body`."""

    async def call(
        self, server: LiveServer, method: str, *positional: str, key: str = "any", headers: Any = None, **fields: Any
    ) -> Any:
        """As `Client.call`."""
        with ExitStack() as opened:
            try:
                async with openai.AsyncOpenAI(
                    base_url=f"{server.url}/v1", api_key=key, max_retries=0, _strict_response_validation=True
                ) as client:
                    function = attrgetter(method)(client)
                    named = _sorted_out(function, {name: _with_open_files(fields[name], opened) for name in fields})
                    value = await function(*positional, **named, extra_headers=headers)
                    if hasattr(value, "__aiter__"):
                        return [item.model_dump(mode="json") async for item in value]
                    return {**value.model_dump(mode="json"), "_request_id": value._request_id}
            except openai.APIError as error:
                raise Raised(_described(error)) from error


def _sorted_out(function: Any, fields: dict[str, Any]) -> dict[str, Any]:
    own = inspect.signature(function).parameters.keys() - {"timeout"}  # the SDK's own, not the field
    extra = {name: value for name, value in fields.items() if name not in own}
    return {**{name: value for name, value in fields.items() if name in own}, "extra_body": extra or None}


def _with_open_files(value: Any, opened: ExitStack) -> Any:
    if isinstance(value, list):
        return [_with_open_files(item, opened) for item in value]
    return opened.enter_context(value.open("rb")) if isinstance(value, Path) else value


def _described(error: openai.APIError) -> dict[str, Any]:
    """Its fields, by their names in the Node SDK."""
    names = {"message": "message", "type": "type", "param": "param", "code": "code", "body": "error"}
    names |= {"status_code": "status", "request_id": "requestID"}
    return {"kind": type(error).__name__} | {names[name]: getattr(error, name, None) for name in names}
