"""The OpenAPI document: what the routes declare, and the bodies that are checked by hand."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from server.requests.schemas import (
    EDIT_FIELDS,
    CompletedEvent,
    EditRequest,
    ErrorBody,
    GenerationRequest,
    ImagesBody,
    JobBody,
    PartialImageEvent,
    ProgressBody,
)

_ERRORS = {
    400: "A field is missing, unknown or out of range, or a picture cannot be used; `param` names it.",
    401: "The key is missing or wrong.",
    404: "There is nothing under this name, or not for this key.",
    409: "The job was cancelled.",
    413: "The body is too large.",
    422: "The `Idempotency-Key` came with another request before.",
    429: "The queue is full, or a limit of the key is reached; `Retry-After` says when to come back.",
    500: "The server failed on this request.",
    503: "No engine, no queue, or shutting down; `Retry-After` says when to come back.",
    504: "The request's `timeout` passed.",
}

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int) -> Responses:
    """The error answers of a route, for its `responses`."""
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}


def _events(*data: type[BaseModel]) -> dict[str, Any]:
    """The content of an answer that is a stream: each event's data is JSON of one of these kinds."""
    kinds = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in (*data, ErrorBody)]
    line = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    # OpenAPI 3.1 has no word for the items of a stream; this is that of 3.2.
    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": line}, "required": ["data"]}
    return {"text/event-stream": {"itemSchema": event}}


EVENTS: Responses = {
    200: {"description": "Server-sent events.", "content": _events(JobBody, ProgressBody, PartialImageEvent)}
}
"""The answer of a route that only streams."""

IMAGES: Responses = {
    200: {
        "model": ImagesBody,
        "description": "The pictures; with `stream`, server-sent events.",
        "content": _events(PartialImageEvent, CompletedEvent),
    },
    202: {
        "model": JobBody,
        "description": "The job, with `Prefer: respond-async`.",
        "headers": {"Location": {"description": "Where the job is.", "schema": {"type": "string"}}},
    },
    **errors(400, 401, 404, 409, 413, 422, 429, 500, 503, 504),
}
"""The answers of a route that makes pictures."""


def _body(schemas: dict[str, str], example: dict[str, Any]) -> dict[str, Any]:
    """What a route takes.

    Args:
        schemas: names by media type.
        example: of the first of them, without its files.
    """
    content: dict[str, dict[str, Any]] = {
        kind: {"schema": {"$ref": f"#/components/schemas/{name}"}} for kind, name in schemas.items()
    }
    next(iter(content.values()))["example"] = example
    return {"requestBody": {"required": True, "content": content}}


GENERATION = _body(
    {"application/json": "GenerationRequest"},
    {"prompt": 'a blue poster, top headline "GLIMMER", center a large yellow star', "size": "256x256", "seed": 1},
)
EDIT = _body(
    {"multipart/form-data": "EditForm", "application/json": "EditRequest"},
    {"prompt": "make the background green", "seed": 1},
)


def document(app: FastAPI, *, open_to_all: bool) -> dict[str, Any]:
    """FastAPI's document with our bodies, without the 422 that never happens, and without a key where none is asked
    for."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    made = FastAPI.openapi(app)
    schemas = made["components"]["schemas"]
    for model in (GenerationRequest, EditRequest, PartialImageEvent, CompletedEvent, ProgressBody, JobBody):
        schemas.update(_schemas(model))
    schemas["EditRequest"]["anyOf"] = [{"required": ["image"]}, {"required": ["images"]}]
    schemas["EditForm"] = _form(schemas["EditRequest"])
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for operations in made["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
            if open_to_all:
                operation.pop("security", None)
    return made


def _schemas(model: type[BaseModel]) -> dict[str, Any]:
    """The model's schema and those it refers to, by name."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs", {}), model.__name__: schema}


def _not_null(field: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field without the null that stands for its absence."""
    notes = {key: value for key, value in field.items() if key != "anyOf" and (key, value) != ("default", None)}
    return {**field["anyOf"][0], **notes} if "anyOf" in field else notes


def _form(edit: dict[str, Any]) -> dict[str, Any]:
    """The multipart form of an edit: texts for the fields, files for the pictures, and no null."""
    fields = {name: _not_null(field) for name, field in edit["properties"].items() if name not in EDIT_FIELDS}
    file = {"type": "string", "format": "binary"}
    files = {
        "image": {**file, "description": "the picture to edit: a PNG, JPEG or WEBP file"},
        "image[]": {"type": "array", "items": file, "minItems": 1, "maxItems": 4, "description": "1..4 such files"},
        "mask": {**file, "description": "a PNG, as large as the first; where its alpha is 0 the picture may change"},
    }
    return {
        "title": "EditForm",
        "description": "`POST /v1/images/edits` as a form; a list of pictures is sent as `image[]`.",
        "type": "object",
        "properties": {**files, **fields},
        "required": edit["required"],
        "anyOf": [{"required": ["image"]}, {"required": ["image[]"]}],
        "additionalProperties": False,
    }
