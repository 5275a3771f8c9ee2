"""Loading: every way a checkpoint can be wrong is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import CheckpointError, PromptError
from models.glm_image.config import SamplingDefaults
from models.glm_image.model import GlmImage
from models.glm_image.prompt import quoted_strings
from models.glm_image.random_checkpoint import cached_random_checkpoint
from tests.checkpoints import load

RENDERER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def rewrite(file: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(file)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor
    save_file(tensors, file)


def test_missing_unexpected_and_misshapen_keys_are_named(copy: Path) -> None:
    rewrite(copy / RENDERER, proj_out__bias=None, extra__weight=torch.zeros(1), proj_out__weight=torch.zeros(2, 2))
    with pytest.raises(CheckpointError) as caught:
        load(copy)
    message = str(caught.value)
    assert "2 missing (proj_out.bias, proj_out.weight)" in message
    assert "1 unexpected (extra.weight)" in message
    assert "proj_out.weight is [2, 2], expected" in message


def test_shards_load_like_one_file(copy: Path, model: GlmImage) -> None:
    folder = copy / "vision_language_encoder"
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    sharded = load(copy)
    assert all(
        torch.equal(a, b)
        for a, b in zip(sharded.planner.state_dict().values(), model.planner.state_dict().values(), strict=True)
    )
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shards are missing: .*model-00002-of-00002"):
        load(copy)


def test_pickles_are_never_read(copy: Path) -> None:
    (copy / RENDERER).rename(copy / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="never read"):
        load(copy)


def test_a_broken_file_is_named(copy: Path) -> None:
    (copy / RENDERER).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(copy)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("model_index.json", None, "model_index.json is missing"),
        ("transformer/config.json", "{", "config.json is not valid JSON"),
        ("transformer/config.json", "[]", "holds no JSON object"),
        ("vision_language_encoder/config.json", None, "config.json is missing"),
        ("processor/tokenizer.json", "{}", "processor cannot be loaded"),
    ],
)
def test_broken_layouts_are_named(copy: Path, file: str, text: str | None, expected: str) -> None:
    if text is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(text)
    with pytest.raises(CheckpointError, match=expected):
        load(copy)


@pytest.mark.parametrize("name", ["no/such/thing/here", "spaces are not allowed"])
def test_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        GlmImage.load(name, torch.device("cpu"), torch.float32)


def test_codebooks_that_differ_are_refused(copy: Path) -> None:
    config = copy / "transformer" / "config.json"
    config.write_text(
        config.read_text().replace('"prior_vq_quantizer_codebook_size": 512', '"prior_vq_quantizer_codebook_size": 99')
    )
    with pytest.raises(CheckpointError, match="512 codes, the renderer 99"):
        load(copy)


def test_sampling_defaults_are_the_file_s() -> None:
    assert SamplingDefaults.from_json({"do_sample": True, "temperature": 0.9, "top_p": 0.75}) == SamplingDefaults(
        0.9, 0.75
    )
    assert SamplingDefaults.from_json({"do_sample": True, "top_k": 20}).top_k == 20
    assert SamplingDefaults.from_json({"do_sample": False, "temperature": 0.9}).temperature == 0.0


def test_quoted_strings_in_the_reference_s_order() -> None:
    prompt = "\"double\" 'single' \u201ccurly\u201d \u300ccorner\u300d 'two' unclosed \""
    assert quoted_strings(prompt) == ["single", "two", "curly", "double", "corner"]


def test_control_tokens_in_a_prompt_are_refused(model: GlmImage) -> None:
    with pytest.raises(PromptError, match=r"<\|image\|>"):
        model.prompts.encode("a <|image|> of a cat", 64, 64)
    with pytest.raises(PromptError, match="<sop>"):
        model.prompts.encode("<sop>3 3<eop>", 64, 64)


def test_too_much_lettering_is_refused(model: GlmImage) -> None:
    with pytest.raises(PromptError, match="at most 8192"):
        model.glyphs.encode(["x" * 2000] * 5)


def test_default_checkpoint_is_made_once(tmp_path: Path) -> None:
    first = cached_random_checkpoint(tmp_path)
    stamp = (first / "model_index.json").stat().st_mtime_ns
    assert cached_random_checkpoint(tmp_path) == first
    assert (first / "model_index.json").stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
