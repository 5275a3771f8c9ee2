"""LangChain's image tool as a client process. A method is one of the tool's, the fields the tool's options."""

from typing import Any

from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper

from tests.clients.calls import serve_calls


def call(request: dict[str, Any]) -> Any:
    connection = {"base_url": f"{request['url']}/v1", "api_key": request["key"], "max_retries": 0}
    tool = DallEAPIWrapper(**connection, **request["fields"])
    return getattr(tool, request["method"])(*request["positional"])


if __name__ == "__main__":
    serve_calls(call)
