"""Files of finished pictures, and what they say of themselves."""

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


def test_a_png_says_how_it_was_made() -> None:
    file = encode(PIXELS, "png", 100, metadata(SPEC, 8))
    assert texts_of(file) == {"seed": "8", "size": "96x64", "model": "zai-org/GLM-Image"}
    assert Image.open(io.BytesIO(file)).tobytes() == PIXELS.numpy().tobytes()


def test_the_prompt_is_in_there_if_that_is_wanted() -> None:
    wanted = JobSpec(SPEC.prompt, 96, 64, seed=7, embed_prompt=True)
    assert texts_of(encode(PIXELS, "png", 100, metadata(wanted, 7))) == {
        "seed": "7",
        "size": "96x64",
        "prompt": SPEC.prompt,
    }


def test_same_pixels_and_texts_same_bytes() -> None:
    first, again, other = (encode(PIXELS, "png", 100, metadata(SPEC, seed)) for seed in (8, 8, 9))
    assert first == again != other


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_formats_say_nothing(output_format: str) -> None:
    file = encode(PIXELS, output_format, 90, metadata(SPEC, 8))  # type: ignore[arg-type]
    assert b"GLM" not in file
    assert Image.open(io.BytesIO(file)).format == output_format.upper()
