"""Loading of weights: safetensors only, never pickle."""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from models.errors import CheckpointError
from models.json_files import read_json

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
FINGERPRINT_CHUNK = 1 << 24  # values, whose sum is one part of a digest
SUMMED_AT_ONCE = 1 << 18  # of them, which stay in a cache: five times as fast as all at once on a CPU
MAX_LISTED_KEYS = 5


def find_checkpoint(model: str) -> Path:
    """Return a folder, or a hub id's snapshot.

    Raises:
        CheckpointError: neither a folder nor downloadable.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except HFValidationError:
        raise CheckpointError(f"{model!r} is neither a folder nor a hub id such as 'zai-org/GLM-Image'") from None
    except Exception as error:  # of the hub, of httpx, of proxies and certificates in the environment
        raise CheckpointError(f"{model!r} is not a folder and cannot be downloaded from the hub: {error}") from error


@torch.inference_mode()
def fingerprint(module: nn.Module) -> str:
    """Return a digest of all weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_sums(tensor)}\n".encode())
    return digest.hexdigest()[:16]


def load_weights(
    module: nn.Module,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rename: Callable[[str], str | None] = lambda key: key,
) -> None:
    """Fill `module`, built on the meta device; `rename` maps a file's keys, None skips.

    Raises:
        CheckpointError: wrong keys or shapes, unreadable files.
    """
    wanted = dict(module.state_dict(keep_vars=True))
    loaded: dict[str, torch.Tensor] = {}
    unexpected, misshapen = [], []
    for key, read in _tensors(folder, str(device)):
        name = rename(key)
        if name is None:
            continue
        if name not in wanted:
            unexpected.append(key)
            continue
        tensor = read()
        if tensor.shape != wanted[name].shape:
            misshapen.append(f"{key} is {list(tensor.shape)}, expected {list(wanted[name].shape)}")
            continue
        loaded[name] = tensor.to(device=device, dtype=dtype)
    _fill_ties(wanted, loaded)
    problems = {"missing": sorted(set(wanted) - set(loaded)), "unexpected": unexpected, "misshapen": misshapen}
    if any(problems.values()):
        raise CheckpointError(f"the weights in {folder} do not match {type(module).__name__}: {_list(problems)}")
    module.load_state_dict(loaded, assign=True)
    module.requires_grad_(False).eval()


def tensor_sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield key and number of values of each tensor in a folder, from the headers of its files.

    Raises:
        CheckpointError: unreadable files.
    """
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:  # type: ignore[no-untyped-call]
                keys = list(tensors.keys())
                yield from ((key, math.prod(tensors.get_slice(key).get_shape())) for key in keys)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error


def _sums(tensor: torch.Tensor) -> list[int]:
    """Sum a tensor's bits by position, modulo 2**64: in any order."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    weights = torch.arange(1, 2 * min(tensor.numel(), SUMMED_AT_ONCE) + 1, 2, device=tensor.device)
    sums = []
    for chunk in tensor.flatten().view(integers).split(FINGERPRINT_CHUNK):
        total = torch.zeros((), dtype=torch.long, device=tensor.device)
        for number, part in enumerate(chunk.split(SUMMED_AT_ONCE)):
            offset = 2 * SUMMED_AT_ONCE * number
            total += (weights[: len(part)] * part).sum() + offset * part.sum(dtype=torch.long)
        sums.append(int(total))
    return sums


def _tensors(folder: Path, device: str) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    files = _files(folder)
    with tqdm(
        total=sum(f.stat().st_size for f in files), unit="B", unit_scale=True, desc=folder.name, disable=None
    ) as bar:
        for file in files:
            try:
                with safe_open(file, framework="pt", device=device) as tensors:  # type: ignore[no-untyped-call]
                    keys = list(tensors.keys())
                    for key in keys:
                        yield key, lambda key=key: tensors.get_tensor(key)
                        bar.update(file.stat().st_size // len(keys))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read: {error}") from error


def _files(folder: Path) -> list[Path]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        files = [folder / name for name in sorted(set(read_json(indices[0])["weight_map"].values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"no *.safetensors in {folder}; other formats (pickle) are never read")
    missing = [str(f) for f in files if not f.is_file()]
    if missing:
        raise CheckpointError(f"shards are missing: {', '.join(missing[:MAX_LISTED_KEYS])}")
    return files


def _fill_ties(wanted: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> None:
    """Fill keys that share a parameter, of which files have one."""
    by_parameter = {id(wanted[name]): tensor for name, tensor in loaded.items()}
    for name, parameter in wanted.items():
        if name not in loaded and id(parameter) in by_parameter:
            loaded[name] = by_parameter[id(parameter)]


def _list(problems: dict[str, list[str]]) -> str:
    parts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - MAX_LISTED_KEYS} more" if len(names) > MAX_LISTED_KEYS else ""
            parts.append(f"{len(names)} {kind} ({', '.join(names[:MAX_LISTED_KEYS])}{more})")
    return "; ".join(parts)
