"""The OpenAPI document: the routes' declarations, and the bodies that they parse."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from engine.geometry import MAX_SOURCES
from server.requests.schemas import EDIT_FIELDS, EditRequest, GenerationRequest
from server.responses.schemas import CompletedEvent, ErrorBody, ImagesBody, JobBody, PartialImageEvent, ProgressBody

_ERRORS = {
    400: "A field is missing, unknown or out of range, or an image cannot be used; `param` names it.",
    401: "The key is missing or wrong.",
    404: "It does not exist, or belongs to another key.",
    409: "The job was cancelled.",
    413: "The body is too large.",
    422: "The `Idempotency-Key` was used with a different request before.",
    429: "The queue is full, or a limit of the key is reached; `Retry-After` says when to retry.",
    500: "The server failed to process this request.",
    503: "No engine, no queue, or shutting down; `Retry-After` says when to retry.",
    504: "The request did not finish within its `timeout`.",
}

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int) -> Responses:
    """Return the error responses of a route."""
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}


def _events(*data: type[BaseModel]) -> dict[str, Any]:
    types = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in (*data, ErrorBody)]
    line = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": types}}
    # `itemSchema` is from OpenAPI 3.2; 3.1 cannot describe a stream's items.
    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": line}, "required": ["data"]}
    return {"text/event-stream": {"itemSchema": event}}


EVENTS: Responses = {
    200: {"description": "Server-sent events.", "content": _events(JobBody, ProgressBody, PartialImageEvent)}
}
"""The response of a route that only streams."""

IMAGES: Responses = {
    200: {
        "model": ImagesBody,
        "description": "The images; with `stream`, server-sent events.",
        "content": _events(PartialImageEvent, CompletedEvent),
    },
    202: {
        "model": JobBody,
        "description": "The job, with `Prefer: respond-async`.",
        "headers": {"Location": {"description": "The URL of the job.", "schema": {"type": "string"}}},
    },
    **errors(400, 401, 404, 409, 413, 422, 429, 500, 503, 504),
}
"""The responses of a route that creates images."""


def _body(schemas: dict[str, str], example: dict[str, Any]) -> dict[str, Any]:
    """Return a request body; `schemas` are names by media type, `example` is of the first."""
    content: dict[str, dict[str, Any]] = {
        media_type: {"schema": {"$ref": f"#/components/schemas/{name}"}} for media_type, name in schemas.items()
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
    """Return FastAPI's document with the bodies, without 422; without security if `open_to_all`."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    openapi_schema = FastAPI.openapi(app)
    schemas = openapi_schema["components"]["schemas"]
    for model in (GenerationRequest, EditRequest, PartialImageEvent, CompletedEvent, ProgressBody, JobBody):
        schemas.update(_schemas(model))
    schemas["EditRequest"]["anyOf"] = [{"required": ["image"]}, {"required": ["images"]}]
    schemas["EditForm"] = _form(schemas["EditRequest"])
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for operations in openapi_schema["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
            if open_to_all:
                operation.pop("security", None)
    if open_to_all:
        openapi_schema["components"].pop("securitySchemes", None)
    return openapi_schema


def _schemas(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs", {}), model.__name__: schema}


def _not_null(field: dict[str, Any]) -> dict[str, Any]:
    """Return the field without null, which a form cannot send."""
    while "anyOf" in field:
        annotations = {key: value for key, value in field.items() if key != "anyOf"}
        field = {**field["anyOf"][0], **annotations}
    return {key: value for key, value in field.items() if (key, value) != ("default", None)}


def _form(edit: dict[str, Any]) -> dict[str, Any]:
    fields = {name: _not_null(field) for name, field in edit["properties"].items() if name not in EDIT_FIELDS}
    file = {"type": "string", "format": "binary"}
    files = {
        "image": {**file, "description": "the image to edit: a PNG, JPEG or WEBP file"},
        "image[]": {
            "type": "array",
            "items": file,
            "minItems": 1,
            "maxItems": MAX_SOURCES,
            "description": f"1..{MAX_SOURCES} such files",
        },
        "mask": {**file, "description": "a PNG of the first image's size; the edit changes only where its alpha is 0"},
    }
    return {
        "title": "EditForm",
        "description": "`POST /v1/images/edits` as a form; a list of images is sent as `image[]`.",
        "type": "object",
        "properties": {**files, **fields},
        "required": edit["required"],
        "anyOf": [{"required": ["image"]}, {"required": ["image[]"]}],
        "additionalProperties": False,
    }
