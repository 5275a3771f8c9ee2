"""Image files and their metadata."""

import io

import pytest
import torch
from PIL import Image

from engine.jobs.job import JobSpec
from engine.worker.encoding import encode, metadata

SPEC = JobSpec("größer: 一只狐狸", 96, 64, seed=7, model="zai-org/GLM-Image")
PIXELS = torch.arange(64 * 96 * 3).reshape(64, 96, 3).remainder(251).to(torch.uint8)


def texts_of(file: bytes) -> dict[str, str]:
    image = Image.open(io.BytesIO(file))
    image.load()
    return dict(image.text)  # type: ignore[attr-defined]


def test_a_png_has_seed_size_and_model() -> None:
    file = encode(PIXELS, "png", 100, metadata(SPEC, 8))
    assert texts_of(file) == {"seed": "8", "size": "96x64", "model": "zai-org/GLM-Image"}
    assert Image.open(io.BytesIO(file)).tobytes() == PIXELS.numpy().tobytes()


def test_the_prompt_is_embedded_if_requested() -> None:
    spec = JobSpec(SPEC.prompt, 96, 64, seed=7, embed_prompt=True)
    assert texts_of(encode(PIXELS, "png", 100, metadata(spec, 7))) == {
        "seed": "7",
        "size": "96x64",
        "prompt": SPEC.prompt,
    }


def test_equal_pixels_and_texts_give_equal_bytes() -> None:
    first, again, other = (encode(PIXELS, "png", 100, metadata(SPEC, seed)) for seed in (8, 8, 9))
    assert first == again != other


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_formats_have_no_metadata(output_format: str) -> None:
    file = encode(PIXELS, output_format, 90, metadata(SPEC, 8))  # type: ignore[arg-type]
    assert b"GLM" not in file
    assert Image.open(io.BytesIO(file)).format == output_format.upper()
