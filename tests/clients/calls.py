"""Calls from the tests to a client in its own process, as in `calls.mjs`, for scripts in Python."""

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve_calls(call: Callable[[dict[str, Any]], Any]) -> None:
    """Serve calls until standard input ends. `call` makes one and returns its result, which JSON can express."""
    results, sys.stdout = sys.stdout, sys.stderr  # the packages print hints
    for line in sys.stdin:
        try:
            result = {"value": call(json.loads(line, object_hook=_file_or))}
        except Exception as error:
            fields = {name: getattr(error, name, None) for name in ("status_code", "message", "param", "code")}
            result = {"error": {"kind": type(error).__name__, **fields}}
        print(json.dumps(result), file=results, flush=True)


def _file_or(value: dict[str, Any]) -> Any:
    if "$bytes" in value:
        return base64.b64decode(value["$bytes"])
    return Path(value["$path"]).open("rb") if "$path" in value else value
