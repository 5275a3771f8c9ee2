"""LiteLLM as a client process (see `calls.mjs`). A method is a function of the package, the fields its arguments."""

import asyncio
import base64
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import litellm


def file_or(value: dict[str, Any]) -> Any:
    if "$bytes" in value:
        return base64.b64decode(value["$bytes"])
    return Path(value["$path"]).open("rb") if "$path" in value else value


def call(line: str) -> Any:
    request = json.loads(line, object_hook=file_or)
    connection = {"api_base": f"{request['url']}/v1", "api_key": request["key"], "max_retries": 0}
    headers = {"extra_headers": request["headers"]} if request["headers"] else {}
    value = getattr(litellm, request["method"])(**connection, **headers, **request["fields"])
    if inspect.iscoroutine(value):
        value = asyncio.run(value)
    return value.model_dump(mode="json")


def main() -> None:
    results, sys.stdout = sys.stdout, sys.stderr  # LiteLLM prints hints
    for line in sys.stdin:
        try:
            result = {"value": call(line)}
        except Exception as error:
            fields = {name: getattr(error, name, None) for name in ("status_code", "message")}
            result = {"error": {"kind": type(error).__name__, **fields}}
        print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    main()
