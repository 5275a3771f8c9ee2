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
    """The official SDK, which validates every response. Unknown fields of a method are sent in `extra_body`."""

    async def call(
        self, server: LiveServer, method: str, *positional: str, key: str = "any", headers: Any = None, **fields: Any
    ) -> Any:
        """Call as `Client.call`."""
        with ExitStack() as opened:
            try:
                async with openai.AsyncOpenAI(
                    base_url=f"{server.url}/v1", api_key=key, max_retries=0, _strict_response_validation=True
                ) as client:
                    function = attrgetter(method)(client)
                    named = _arguments(function, {name: _with_open_files(fields[name], opened) for name in fields})
                    value = await function(*positional, **named, extra_headers=headers)
                    if hasattr(value, "__aiter__"):
                        return [item.model_dump(mode="json") async for item in value]
                    return {**value.model_dump(mode="json"), "_request_id": value._request_id}
            except openai.APIError as error:
                raise Raised(_attributes(error)) from error


def _arguments(function: Any, fields: dict[str, Any]) -> dict[str, Any]:
    known = inspect.signature(function).parameters.keys() - {"timeout"}  # that of the SDK
    extra = {name: value for name, value in fields.items() if name not in known}
    return {**{name: value for name, value in fields.items() if name in known}, "extra_body": extra or None}


def _with_open_files(value: Any, opened: ExitStack) -> Any:
    if isinstance(value, list):
        return [_with_open_files(item, opened) for item in value]
    return opened.enter_context(value.open("rb")) if isinstance(value, Path) else value


def _attributes(error: openai.APIError) -> dict[str, Any]:
    """Return the error's attributes under their names in the Node SDK."""
    names = {"message": "message", "type": "type", "param": "param", "code": "code", "body": "error"}
    names |= {"status_code": "status", "request_id": "requestID"}
    return {"kind": type(error).__name__} | {names[name]: getattr(error, name, None) for name in names}
