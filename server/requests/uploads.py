"""Reading the body of an edit: a multipart form, or JSON with `data:` URLs."""

import asyncio
import binascii
import io
import re
from collections.abc import AsyncIterator, Callable, Iterable
from operator import itemgetter
from typing import Any, get_args
from urllib.parse import unquote_to_bytes

import orjson

from engine.geometry import MAX_SOURCES
from server.errors import ApiError, invalid, invalid_image
from server.requests.body import IncomingBody, ParsedBody, load_json, read_json_object
from server.requests.encodings import charset_of
from server.requests.forms import Part, read_parts
from server.requests.schemas import (
    MAX_NAME_CHARS,
    UNSUPPORTED,
    EditRequest,
    ImageReference,
    PlanBody,
    parse,
    unsupported,
)

_PIECE_CHARS, _ESCAPED_PIECE_CHARS = 2**20, 2**16

_FILES = re.compile(r"(?P<field>image|mask)(\[(?P<index>[0-9]{0,4})\])?")  # PHP and others write image[0]
_CHARSET_FIELD = "_charset_"  # RFC 7578 4.6: the encoding of text

_INTEGER = re.compile(r"-?[0-9]{1,20}")
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?")
_DATA_URL = re.compile(r"data:[^,]{0,200}?(?P<base64>; *base64)?,", re.IGNORECASE)
_WEB_URL = re.compile(r"https?:", re.IGNORECASE)
_PLAN_PART = re.compile(r"plan(?P<preview>\[preview\])?\[(?:(?P<side>rows|cols)|tokens\]\[(?P<index>[0-9]{0,4}))\]")


async def read_edit(body: IncomingBody) -> ParsedBody:
    """Read the body of an edit. Raises as `read_generation`."""
    if body.media_type == "multipart/form-data":
        edit = await _from_parts(await read_parts(body.content_type, body.chunks(), _FILES), body.content_type)
    elif body.media_type == "application/json":
        edit = await _from_json(parse(EditRequest, await read_json_object(body)))
    else:
        raise invalid(None, "The body must be multipart/form-data, or JSON with Content-Type: application/json.")
    if not edit.images:
        raise invalid("image", "The field image is required: the image to edit.", "missing_required_parameter")
    if len(edit.images) > MAX_SOURCES:
        raise invalid("image", f"Invalid value for image: it takes 1..{MAX_SOURCES} images, not {len(edit.images)}.")
    return edit


# --- JSON -------------------------------------------------------------------------------------------------------------


async def _from_json(request: EditRequest) -> ParsedBody:
    if request.image is not None and request.images is not None:
        raise invalid("images", "image and images are two names of the same field; send only one of them.")
    name = "image" if request.images is None else "images"
    value = request.image if request.images is None else request.images
    references = value if isinstance(value, list) else [] if value is None else [value]
    return ParsedBody(
        request.model_copy(update={"image": None, "images": None, "mask": None}),
        [await _decode_reference(name, reference) for reference in references],
        None if request.mask is None else await _decode_reference("mask", request.mask),
    )


async def _decode_reference(param: str, reference: str | ImageReference) -> bytes:
    url = reference if isinstance(reference, str) else reference.image_url
    if _WEB_URL.match(url):
        raise invalid(param, f"{param}: this server does not fetch URLs; send the file itself or a data: URL.")
    match = _DATA_URL.match(url)
    if match is None:
        raise invalid(param, f"{param}: an image in JSON must be a data: URL, like data:image/png;base64,iVBORw0...")
    pieces = _pieces(url, match.end())
    try:
        return await (_decode_base64(pieces) if match["base64"] else _joined(pieces))
    except ValueError:
        raise invalid_image(param, f"{param}: the data: URL does not contain valid base64.") from None


async def _pieces(text: str, start: int) -> AsyncIterator[bytes]:
    """Yield what follows `start`, percent-decoded (RFC 2397). Other requests are served between pieces: 32 MB at once
    would take 40 ms, and seconds with an escape for each byte."""
    rest, size = "", _PIECE_CHARS if text.find("%", start) < 0 else _ESCAPED_PIECE_CHARS
    for position in range(start, len(text), size):
        piece = rest + text[position : position + size]
        cut = piece.rfind("%", -2)  # the escape may go on in the next piece
        rest = "" if cut < 0 else piece[cut:]
        yield unquote_to_bytes(piece if cut < 0 else piece[:cut])
        await asyncio.sleep(0)
    yield rest.encode()


async def _joined(pieces: AsyncIterator[bytes]) -> bytes:
    data = io.BytesIO()
    async for piece in pieces:
        data.write(piece)
    return data.getvalue()


async def _decode_base64(pieces: AsyncIterator[bytes]) -> bytes:
    """Decode base64 with or without white space and padding.

    Raises:
        ValueError: it is not base64.
    """
    decoded, rest, is_padded = io.BytesIO(), b"", False
    async for more in pieces:
        piece = rest + more.translate(None, b" \t\r\n\f")
        if piece and is_padded:
            raise ValueError("more follows after the padding")
        end = len(piece) // 4 * 4
        decoded.write(binascii.a2b_base64(piece[:end], strict_mode=True))
        rest, is_padded = piece[end:], is_padded or piece[:end].endswith(b"=")
    if rest and is_padded:
        raise ValueError("more follows after the padding")
    decoded.write(binascii.a2b_base64(rest + b"=" * (-len(rest) % 4), strict_mode=True))
    return decoded.getvalue()


# --- forms ------------------------------------------------------------------------------------------------------------


async def _from_parts(parts: list[Part], content_type: str) -> ParsedBody:
    charset = charset_of(content_type)
    files: dict[str, list[tuple[int, Part]]] = {"image": [], "mask": []}
    fields = []
    for part in parts:
        if match := _FILES.fullmatch(part.name):
            files[match["field"]].append((int(match["index"] or 0), part))
        elif part.name == _CHARSET_FIELD:
            charset = part.text("utf-8").strip().lower()[:MAX_NAME_CHARS]
        else:
            fields.append(part)
    images, masks = ([part for _, part in sorted(found, key=itemgetter(0))] for found in files.values())
    if len(masks) > 1:
        raise invalid("mask", f"Invalid value for mask: it takes one image, not {len(masks)}.")
    request = parse(EditRequest, _fields(fields, charset))
    return ParsedBody(request, [await _file(part) for part in images], await _file(masks[0]) if masks else None)


async def _file(part: Part) -> bytes:
    """Return a part's file, which may be a `data:` URL."""
    if part.data[:5].lower() not in (b"data:", b"http:", b"https"):
        return part.data
    return await _decode_reference(part.name.partition("[")[0], part.data.decode(errors="replace").strip())


def _fields(parts: Iterable[Part], charset: str) -> dict[str, Any]:
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
            _add_to_plan(plan, match, part.name, part.text(charset))
            continue
        if part.name in fields:
            raise _sent_twice(part.name)
        if part.name not in EditRequest.model_fields:
            fields[part.name] = ""  # `parse` refuses it, whatever its value
            continue
        convert = _CONVERTERS.get(part.name)
        text = part.text(charset)
        fields[part.name] = text if convert is None else convert(text)
    if plan and "plan" in fields:
        raise _sent_twice("plan")
    return {**fields, "plan": plan} if plan else fields


def _add_to_plan(plan: dict[str, Any], match: re.Match[str], name: str, text: str) -> None:
    """Add `plan[rows]`, `plan[tokens][]` or `plan[preview][tokens][7]`."""
    grid = plan.setdefault("preview", {}) if match["preview"] else plan
    side = match["side"]
    if side is None:
        tokens = grid.setdefault("tokens", [])
        if match["index"] and int(match["index"]) != len(tokens):
            raise invalid("plan", f"{name} is out of order: token {len(tokens)} is next.")
        tokens.append(_integer(text))
    elif side in grid:
        raise _sent_twice(name)
    else:
        grid[side] = _integer(text)


def _sent_twice(name: str) -> ApiError:
    return invalid(name, f"{name} was sent twice; send it once.")


def _integer(text: str) -> Any:
    """Convert an integer, or 1.0, which `parse` takes for one."""
    return int(text) if _INTEGER.fullmatch(text) else _number(text)


def _number(text: str) -> Any:
    return float(text) if _NUMBER.fullmatch(text) else text


def _boolean(text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), text)  # Python's requests sends True


def _json(text: str) -> Any:
    try:
        return load_json(text.encode(), "plan")
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
