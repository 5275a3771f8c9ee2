"""LiteLLM as a client process. A method is a function of the package, the fields its arguments."""

import asyncio
import inspect
from typing import Any

import litellm

from tests.clients.calls import serve_calls


def call(request: dict[str, Any]) -> Any:
    connection = {"api_base": f"{request['url']}/v1", "api_key": request["key"], "max_retries": 0}
    headers = {"extra_headers": request["headers"]} if request["headers"] else {}
    value = getattr(litellm, request["method"])(**connection, **headers, **request["fields"])
    if inspect.iscoroutine(value):
        value = asyncio.run(value)
    return value.model_dump(mode="json")


if __name__ == "__main__":
    serve_calls(call)
