"""Frames between API and decode worker: length and JSON of a head, then blobs of its `sizes`."""

import json
from asyncio import StreamReader
from collections.abc import Sequence
from typing import Any, BinaryIO

from engine.jobs.job import SourceImages
from server.image_files.edit_input import EditFiles, EditInput, InvalidImage

Frame = tuple[dict[str, Any], list[bytes]]


def encode_request(files: EditFiles) -> list[bytes]:
    head = {"has_mask": files.mask is not None, "size": files.size, "max_pixels": files.max_pixels}
    return _frame(head, [*files.images, *([] if files.mask is None else [files.mask])])


def decode_request(head: dict[str, Any], blobs: list[bytes]) -> EditFiles:
    mask = blobs.pop() if head["has_mask"] else None
    return EditFiles(blobs, mask, head["size"] and tuple(head["size"]), head["max_pixels"])


def encode_report(param: str, name: str) -> bytes:
    """Return the frame sent before work on a file."""
    return b"".join(_frame({"param": param, "name": name}, []))


def encode_refusal(error: InvalidImage) -> list[bytes]:
    return _frame({"param": error.param, "refused": error.message}, [])


def encode_input(edit: EditInput) -> list[bytes]:
    sources = edit.source_images
    head = {"size": edit.size, "tokens": edit.tokens, "has_overlay": sources.overlay is not None}
    return _frame(head, [*sources.files, *([] if sources.overlay is None else [sources.overlay])])


def decode_reply(head: dict[str, Any], blobs: list[bytes]) -> EditInput:
    """Return the result; raise the `InvalidImage` that the worker raised."""
    if "refused" in head:
        raise InvalidImage(head["param"], head["refused"])
    overlay = blobs.pop() if head["has_overlay"] else None
    return EditInput(tuple(head["size"]), head["tokens"], SourceImages(blobs, overlay))


def read_frame(stream: BinaryIO) -> Frame | None:
    """Read a frame; None at the end of the stream."""
    length = stream.read(4)
    if len(length) < 4:
        return None
    head = json.loads(stream.read(int.from_bytes(length, "big")))
    return head, [stream.read(size) for size in head["sizes"]]


async def receive_frame(stream: StreamReader) -> Frame:
    """Read a frame; raise `IncompleteReadError` at the end of the stream."""
    length = int.from_bytes(await stream.readexactly(4), "big")
    head = json.loads(await stream.readexactly(length))
    return head, [await stream.readexactly(size) for size in head["sizes"]]


def _frame(head: dict[str, Any], blobs: Sequence[bytes]) -> list[bytes]:
    text = json.dumps({**head, "sizes": [len(blob) for blob in blobs]}).encode()
    return [len(text).to_bytes(4, "big") + text, *blobs]
