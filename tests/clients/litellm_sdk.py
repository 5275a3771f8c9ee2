"""LiteLLM, called as `calls.mjs` says. A method is a function of the package, and the fields are its arguments."""

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
    asked = json.loads(line, object_hook=file_or)
    connection = {"api_base": f"{asked['url']}/v1", "api_key": asked["key"], "max_retries": 0}
    headers = {"extra_headers": asked["headers"]} if asked["headers"] else {}
    value = getattr(litellm, asked["method"])(**connection, **headers, **asked["fields"])
    if inspect.iscoroutine(value):
        value = asyncio.run(value)
    return value.model_dump(mode="json")


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # LiteLLM prints advice
    for line in sys.stdin:
        try:
            outcome = {"value": call(line)}
        except Exception as error:
            fields = {name: getattr(error, name, None) for name in ("status_code", "message")}
            outcome = {"error": {"kind": type(error).__name__, **fields}}
        print(json.dumps(outcome), file=answers, flush=True)


if __name__ == "__main__":
    main()
