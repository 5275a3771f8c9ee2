"""Loading of checkpoints: errors name what is wrong."""

import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.quotes import quoted_strings
from models.errors import CheckpointError, PromptError
from models.glm_image.config import RequestDefaults, SamplingDefaults
from models.glm_image.model import GlmImage
from models.glm_image.random_weights import cached_random_checkpoint
from server.errors import ApiError
from server.requests.schemas import GenerationRequest, parse
from server.requests.validation import validate
from server.settings import ServerSettings
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


def test_a_checkpoint_without_its_vision_tokenizer_is_named(copy: Path) -> None:
    rewrite(copy / "vision_language_encoder" / "model.safetensors", model__visual__patch_embed__proj__bias=None)
    with pytest.raises(CheckpointError, match=r"VisionTokenizer: 1 missing \(visual.patch_embed.proj.bias\)"):
        load(copy)


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
        ("transformer/config.json", "[]", "config.json is not a JSON object"),
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
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name: str) -> None:
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


def test_request_defaults_are_the_file_s(copy: Path, model: GlmImage) -> None:
    assert model.defaults == RequestDefaults(50, 1.5, None)  # no file
    (copy / "glimmer.json").write_text('{"num_inference_steps": 7, "guidance_scale": 2, "size": "128x96"}')
    assert load(copy).defaults == RequestDefaults(7, 2.0, "128x96")


@pytest.mark.parametrize("key", ["num_inference_steps", "guidance_scale", "size", "max_text_characters"])
def test_every_request_default_is_optional(tmp_path: Path, key: str) -> None:
    values = {"num_inference_steps": 1, "guidance_scale": 0, "size": "64x64", "max_text_characters": 1}
    value = values[key]
    file = tmp_path / "glimmer.json"
    file.write_text(json.dumps({key: value}))
    assert RequestDefaults.read(file) == replace(RequestDefaults(), **{key: value})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[]", "not a JSON object"),
        ('{"steps": 12}', "unknown key 'steps'"),
        *(
            (f'{{"num_inference_steps": {value}}}', "num_inference_steps")
            for value in ("0", "201", "2.0", "true", '"9"')
        ),
        *((f'{{"guidance_scale": {value}}}', "guidance_scale") for value in ("-1", "20.1", "NaN", "false", "null")),
        *((f'{{"max_text_characters": {value}}}', "max_text_characters") for value in ("0", "true", "9.0", "null")),
        *((f'{{"size": {value}}}', "size") for value in ('"auto"', '"64x0064"', '"64X64"', '" 64x64"', "[64, 64]")),
    ],
)
def test_request_defaults_that_cannot_be_used_are_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "glimmer.json"
    file.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        RequestDefaults.read(file)
    assert str(file) in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_inference_steps", value) for value in (0, 1, 200, 201, True)),
        *(("guidance_scale", value) for value in (-0.1, 0, 1, 20, 20.1, True)),
        *(("size", f"{side}x{side}") for side in (63, 64, 99, 2048, 2049, 10000)),
        *(("size", size) for size in ("64x256", "64x257", "256x64", "257x64", "x64", "64", "٦٤x٦٤", "64x64\n")),
    ],
)
def test_request_defaults_have_the_bounds_of_requests(tmp_path: Path, field: str, value: object) -> None:
    file = tmp_path / "glimmer.json"
    file.write_text(json.dumps({field: value}))
    with nullcontext() if _is_valid_in_a_request(field, value) else pytest.raises(CheckpointError):
        RequestDefaults.read(file)


def _is_valid_in_a_request(field: str, value: object) -> bool:
    try:
        validate(parse(GenerationRequest, {"prompt": "x", field: value}), ServerSettings())
    except ApiError:
        return False
    return True


def test_a_checkpoint_with_such_defaults_is_refused(copy: Path) -> None:
    (copy / "glimmer.json").write_text('{"size": "2048x64"}')
    with pytest.raises(CheckpointError, match=r"size in .*glimmer\.json is '2048x64'"):
        load(copy)


def test_quoted_strings_in_the_reference_s_order() -> None:
    prompt = "\"double\" 'single' \u201ccurly\u201d \u300ccorner\u300d 'two' unclosed \""
    assert quoted_strings(prompt) == ["single", "two", "curly", "double", "corner"]


@pytest.mark.parametrize(
    ("prompt", "strings"),
    [
        ('a sign "SALE" and "OPEN"', ["SALE", "OPEN"]),
        ("a sign 'SALE', a sign 'DON'T STOP'", ["SALE", "DON'T STOP"]),
        ("a sign \u201cSALE\u201d \u300cOPEN\u300d 'NOW' \"x\"", ["NOW", "SALE", "x", "OPEN"]),
        ("the shop's door and mum's car", []),
        ("the shop's door, mum's \"SALE\"", ["SALE"]),
        ('headline "DON\'T", footer "IT\'S ON"', ["DON'T", "IT'S ON"]),
        ("a t-shirt for the '90s, I don't care", []),
        ("a book \"The 'best' of\" and 'an \"odd\" one'", ['an "odd" one', "The 'best' of"]),
        ("海报'促销'上", ["促销"]),
        ("'' \"\"", ["", ""]),
        (
            '\u2018DON\u2019T\u2019 \u201eAUF\u201c \u00abOUI\u00bb \u300e\u958b\u300f \uff02NOW\uff02 "x"',
            ["x", "DON\u2019T", "AUF", "OUI", "\u958b", "NOW"],
        ),
        ("the shop\u2019s door and mum\u2019s car", []),
        ("the \u201880s, rock \u2019n\u2019 roll", []),
        ("'open and \"", []),
    ],
)
def test_strict_quotations(prompt: str, strings: list[str]) -> None:
    assert quoted_strings(prompt, "strict") == strings


@given(text=st.text("a'\"\u201c\u201d \u300c\u300d\u2018\u2019\u201e\u00ab\u00bb", max_size=12))
def test_strict_quotations_do_not_overlap(text: str) -> None:
    """And without apostrophes and nesting, both rules find the same."""
    strings = quoted_strings(text, "strict")
    assert sum(len(string) + 2 for string in strings) <= len(text)
    simple = "".join(f'"{part}" ' for part in re.findall("[a ]+", text))
    assert quoted_strings(simple, "strict") == quoted_strings(simple)


def test_strict_quotations_take_linear_time() -> None:
    for part in ("'", "'a", " 'a", "a'a", "\u201c", " 'a'a", "' ", "\u2018", "\u2018a\u2019b", "\u201e", "\u00ab"):
        few, many = (min(_seconds_of_strict_quotes(part * size) for _ in range(3)) for size in (20_000, 160_000))
        assert many < 30 * few + 0.5, part


def _seconds_of_strict_quotes(text: str) -> float:
    """Return the time of this thread: others may run meanwhile."""
    start = time.thread_time()
    quoted_strings(text, "strict")
    return time.thread_time() - start


def test_control_tokens_in_a_prompt_are_refused(model: GlmImage) -> None:
    with pytest.raises(PromptError, match=r"<\|image\|>"):
        model.prompts.encode("a <|image|> of a cat", 64, 64)
    with pytest.raises(PromptError, match="<sop>"):
        model.prompts.encode("<sop>3 3<eop>", 64, 64)


def test_too_many_glyphs_are_refused(model: GlmImage) -> None:
    with pytest.raises(PromptError, match="at most 8192"):
        model.glyphs.encode(["x" * 2000] * 5)


def test_an_engine_does_not_import_random_weights() -> None:
    code = "import sys, engine.worker.process; sys.exit('models.glm_image.random_weights' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_cached_random_checkpoint_is_made_once(tmp_path: Path) -> None:
    first = cached_random_checkpoint(tmp_path)
    stamp = (first / "model_index.json").stat().st_mtime_ns
    assert cached_random_checkpoint(tmp_path) == first
    assert (first / "model_index.json").stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
