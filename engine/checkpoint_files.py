"""A look at a checkpoint's files before torch is imported, which takes seconds."""

import json
import re
from contextlib import suppress
from pathlib import Path

from engine.errors import StartError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_HEADER_BYTES = 100 * 2**20  # as safetensors has it
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PARTS = ("vision_language_encoder", "transformer", "text_encoder", "vae", "processor", "tokenizer", "scheduler")


def check_checkpoint(model: str | None) -> None:
    """Raise `StartError` for a folder without a whole checkpoint; a hub id is left to the engine."""
    if not model:
        return
    try:
        folder = Path(model).expanduser()
        if not folder.is_dir():
            if folder.exists() or not _HUB_ID.fullmatch(model):
                raise StartError(f"GLIMMER_MODEL: {model} is neither a folder nor a hub id such as zai-org/GLM-Image")
            return
        if not (folder / "model_index.json").is_file():
            raise StartError(
                f"GLIMMER_MODEL: {folder} has no model_index.json: not a GLM-Image checkpoint in the diffusers layout"
            )
        for file in [folder / "model_index.json", *(file for part in _PARTS for file in _files(folder / part))]:
            _check_file(file)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~ without a home
        raise StartError(
            f"GLIMMER_MODEL: {model} cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None


def _files(part: Path) -> list[Path]:
    """Return the files that an engine reads; those that it does not find it names itself."""
    files = sorted(part.glob("*"))
    index = next((file for file in files if file.name.endswith(".safetensors.index.json")), None)
    shards = None
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        shards = set(json.loads(index.read_bytes())["weight_map"].values()) if index else None
    if shards is not None:
        files = [file for file in files if file.suffix != ".safetensors" or file.name in shards]
    return [file for file in files if file.is_file() or file.is_symlink()]


def _check_file(path: Path) -> None:
    if not path.exists():
        raise StartError(f"{path} is a link to a file that is missing; download the checkpoint again")
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise StartError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}")
        if path.suffix != ".safetensors":
            return
        size, header_bytes = path.stat().st_size, int.from_bytes(start[:8], "little")
        if len(start) < 8 or header_bytes > _MAX_HEADER_BYTES:
            raise StartError(f"{path} is not a safetensors file; download the checkpoint again")
        file.seek(8)
        expected = _expected_bytes(file.read(header_bytes))
        if expected is None:
            raise StartError(f"{path} is damaged or incomplete; download the checkpoint again")
        if size != 8 + header_bytes + expected:
            raise StartError(
                f"{path} has {size} bytes, {8 + header_bytes + expected} are expected; download the checkpoint again"
            )


def _expected_bytes(header: bytes) -> int | None:
    """Return the bytes after a safetensors header, None if it cannot be read."""
    try:
        entries = json.loads(header)
        return max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
