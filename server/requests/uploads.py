"""Reading the body of an edit: a multipart form, or JSON with `data:` URLs.

Strings of a form are converted to the types of their fields; what cannot be stays a string, refused by `parse`.
"""

import base64
import re
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, get_args

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from engine.geometry import MAX_SOURCES
from server.errors import ApiError, invalid, invalid_image
from server.requests.body import IncomingBody, ParsedBody, read_json_object
from server.requests.schemas import UNSUPPORTED, EditRequest, ImageReference, PlanBody, parse, unsupported

MAX_PARTS = 10_000  # the official SDK sends a plan as one part per token, up to 4352

_IMAGE_NAMES, _MASK_NAMES = {"image", "image[]"}, {"mask", "mask[]"}

_INTEGER = re.compile(r"-?[0-9]{1,20}")
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?")
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_WEB_URL = re.compile(r"https?:", re.IGNORECASE)
_PLAN_PART = re.compile(r"plan(?P<preview>\[preview\])?\[(?:(?P<side>rows|cols)|tokens\]\[)\]")


async def read_edit(body: IncomingBody) -> ParsedBody:
    """Read the body of an edit. Raises as `read_generation`."""
    if body.media_type == "multipart/form-data":
        edit = _from_parts(await _read_parts(body))
    elif body.media_type == "application/json":
        edit = _from_json(parse(EditRequest, await read_json_object(body)))
    else:
        raise invalid(None, "The body must be multipart/form-data, or JSON with Content-Type: application/json.")
    if not edit.images:
        raise invalid("image", "The field image is required: the image to edit.", "missing_required_parameter")
    if len(edit.images) > MAX_SOURCES:
        raise invalid("image", f"Invalid value for image: it takes 1..{MAX_SOURCES} images, not {len(edit.images)}.")
    return edit


# --- JSON -------------------------------------------------------------------------------------------------------------


def _from_json(request: EditRequest) -> ParsedBody:
    if request.image is not None and request.images is not None:
        raise invalid("images", "image and images are two names of the same field; send only one of them.")
    name = "image" if request.images is None else "images"
    value = request.image if request.images is None else request.images
    references = value if isinstance(value, list) else [] if value is None else [value]
    return ParsedBody(
        request.model_copy(update={"image": None, "images": None, "mask": None}),
        [_decode_reference(name, reference) for reference in references],
        None if request.mask is None else _decode_reference("mask", request.mask),
    )


def _decode_reference(param: str, reference: str | ImageReference) -> bytes:
    url = reference if isinstance(reference, str) else reference.image_url
    if _WEB_URL.match(url):
        raise invalid(param, f"{param}: this server does not fetch URLs; send the file itself or a data: URL.")
    match = _DATA_URL.match(url)
    if match is None:
        raise invalid(param, f"{param}: an image in JSON must be a data: URL, like data:image/png;base64,iVBORw0...")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except ValueError:
        raise invalid_image(param, f"{param}: the data: URL does not contain valid base64.") from None


# --- forms ------------------------------------------------------------------------------------------------------------


@dataclass
class _Part:
    name: str
    is_file: bool
    data: bytearray = field(default_factory=bytearray)

    @property
    def text(self) -> str:
        """Return the value of a text part."""
        if self.is_file:
            raise invalid(self.name, f"{self.name} must be sent as text, without a file name.")
        try:
            return self.data.decode()
        except UnicodeDecodeError:
            raise invalid(self.name, f"Invalid value for {self.name}: it is not valid UTF-8.") from None

    @property
    def file(self) -> bytes:
        """Return the file, which may also be sent as a `data:` URL."""
        param = self.name.removesuffix("[]")
        if self.data[:5].lower() in (b"data:", b"http:", b"https"):
            return _decode_reference(param, self.data.decode(errors="replace").strip())
        return bytes(self.data)


class _FormReader:
    """Collects the parts of a form. The methods are the parser's callbacks."""

    def __init__(self, content_type: str) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise _invalid_form("its Content-Type does not name a boundary")
        names = ("part_begin", "part_data", "header_field", "header_value", "header_end", "headers_finished", "end")
        self._parser = MultipartParser(boundary, {f"on_{name}": getattr(self, f"_{name}") for name in names})  # type: ignore[arg-type]
        self._parts: list[_Part] = []
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._is_complete = False

    async def read(self, chunks: AsyncIterator[bytes]) -> list[_Part]:
        async for chunk in chunks:
            self._parser.write(chunk)
        if not self._is_complete:
            raise _invalid_form("it ends before its last boundary")
        return self._parts

    def _part_begin(self) -> None:
        self._disposition = b""
        if len(self._parts) == MAX_PARTS:
            raise _invalid_form(f"it has more than {MAX_PARTS} parts")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        options = parse_options_header(self._disposition)[1]
        if b"name" not in options:
            raise _invalid_form("one of its parts has no name")
        self._parts.append(_Part(options[b"name"].decode(errors="replace"), b"filename" in options))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._parts[-1].data += data[start:end]

    def _end(self) -> None:
        self._is_complete = True


async def _read_parts(body: IncomingBody) -> list[_Part]:
    try:
        return await _FormReader(body.headers["content-type"]).read(body.chunks())
    except FormParserError:
        raise _invalid_form("it cannot be parsed") from None


def _invalid_form(reason: str) -> ApiError:
    return invalid(None, f"The body is not a valid multipart form: {reason}.")


def _from_parts(parts: list[_Part]) -> ParsedBody:
    images = [part for part in parts if part.name in _IMAGE_NAMES]
    masks = [part for part in parts if part.name in _MASK_NAMES]
    if len(masks) > 1:
        raise invalid("mask", f"Invalid value for mask: it takes one image, not {len(masks)}.")
    request = parse(EditRequest, _fields(part for part in parts if part.name not in _IMAGE_NAMES | _MASK_NAMES))
    return ParsedBody(request, [part.file for part in images], masks[0].file if masks else None)


def _fields(parts: Iterable[_Part]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    plan: dict[str, Any] = {}
    for part in parts:
        if part.name in ("images", "images[]"):
            message = f"Unknown parameter: {part.name}. Send images as image or image[]."
            raise invalid(part.name, message, "unknown_parameter")
        field = part.name.partition("[")[0]  # the official SDK spells a nested one `svg[model]`
        if field in UNSUPPORTED:
            raise unsupported(field)
        if match := _PLAN_PART.fullmatch(part.name):
            _add_to_plan(plan, match, part)
            continue
        if part.name in fields:
            raise _sent_twice(part.name)
        if part.name not in EditRequest.model_fields:
            fields[part.name] = ""  # `parse` refuses it, whatever its value
            continue
        convert = _CONVERTERS.get(part.name)
        fields[part.name] = part.text if convert is None else convert(part.text)
    if plan and "plan" in fields:
        raise _sent_twice("plan")
    return {**fields, "plan": plan} if plan else fields


def _add_to_plan(plan: dict[str, Any], match: re.Match[str], part: _Part) -> None:
    """Add `plan[rows]`, `plan[tokens][]` or `plan[preview][tokens][]`, the official SDK's names in a form."""
    grid = plan.setdefault("preview", {}) if match["preview"] else plan
    side = match["side"]
    if side is None:
        grid.setdefault("tokens", []).append(_integer(part.text))
    elif side in grid:
        raise _sent_twice(part.name)
    else:
        grid[side] = _integer(part.text)


def _sent_twice(name: str) -> ApiError:
    return invalid(name, f"{name} was sent twice; send it once.")


def _integer(text: str) -> Any:
    return int(text) if _INTEGER.fullmatch(text) else text


def _number(text: str) -> Any:
    return float(text) if _NUMBER.fullmatch(text) else text


def _boolean(text: str) -> Any:
    return {"true": True, "false": False}.get(text, text)


def _json(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _converter_for(annotation: Any) -> Callable[[str], Any] | None:
    types = {annotation, *get_args(annotation)}
    converters = ((bool, _boolean), (float, _number), (int, _integer), (PlanBody, _json))
    return next((convert for type_, convert in converters if type_ in types), None)


_CONVERTERS = {
    name: convert
    for name, field_info in EditRequest.model_fields.items()
    if (convert := _converter_for(field_info.annotation)) is not None
}
