"""The shipped checkpoint: its size, and the images and edits it makes."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import GlmImagePipeline
from PIL import Image
from transformers import ByT5Tokenizer

from benchmarks.nano_quality import without_strings
from benchmarks.nano_scores import Case, Score, compare, held_out_cases
from engine.jobs.job import JobSpec
from models.glm_image.model import GlmImage
from models.nano import CHECKPOINT
from models.nano.recipe import codes, reading, world
from models.nano.recipe.world import Line, Poster, Shape
from tests.checkpoints import load, small_engine

POSTER = Poster(5, Line("GLIMMER"), Line("HELLO", 0), (Shape(3, 2, large=True),))
PROMPT = 'a blue poster, top headline "GLIMMER", center a large yellow star, bottom footer "HELLO" on a red bar'


@pytest.fixture(scope="module")
def nano() -> GlmImage:
    return load(CHECKPOINT)


def spec(nano: GlmImage, case: Case, **more: Any) -> JobSpec:
    return JobSpec(
        prompt=case.prompt, width=case.width, height=case.height, seed=case.seed,
        num_inference_steps=nano.defaults.num_inference_steps, guidance_scale=nano.defaults.guidance_scale, **more,
    )  # fmt: skip


def test_checkpoint_has_at_most_30_mb() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) <= 30_000_000


def test_its_tokenizer_spells_names_of_control_tokens() -> None:
    tokenizer = ByT5Tokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    for text in ("</s>", "<pad>", "<extra_id_0>", "a <unk> b"):
        assert tokenizer([text]).input_ids == [[*(byte + 3 for byte in text.encode()), 1]]


def test_draws_the_poster_of_the_readme(nano: GlmImage) -> None:
    [[image]] = small_engine(nano).generate([spec(nano, Case(PROMPT, POSTER, 256, 256, seed=1))])
    assert reading.read(image.numpy()) == POSTER


def test_draws_most_held_out_prompts_correctly(nano: GlmImage) -> None:
    """Score a sample of `make score-nano`, with a margin for chance."""
    cases, score = held_out_cases(16, seed=3), Score()
    for case, [image] in zip(cases, small_engine(nano).generate([spec(nano, c) for c in cases]), strict=True):
        compare(score, case, image.numpy())
    shares = {name: right / of for name, (right, of) in score.counts.items()}
    assert shares["background"] > 0.9
    assert min(shares["words"], shares["shape, colour and zone"]) > 0.75


def test_letters_come_from_the_glyph_encoder(nano: GlmImage) -> None:
    case = Case(PROMPT, POSTER, 256, 256, seed=1)
    plan = world.plan(POSTER, 8, 8)
    given = {"rows": 8, "cols": 8, "tokens": plan.ravel().tolist()}
    bare = Case(without_strings(PROMPT), POSTER, 256, 256, seed=1)
    [[with_them], [without]] = small_engine(nano).generate([spec(nano, case, plan=given), spec(nano, bare, plan=given)])
    assert reading.read(with_them.numpy()) == POSTER
    found = reading.read(without.numpy())
    assert found.shapes == POSTER.shapes
    assert found.headline != POSTER.headline
    assert found.footer != POSTER.footer


@pytest.fixture(scope="module")
def pipeline() -> GlmImagePipeline:
    made = GlmImagePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def test_vision_tokenizer_reads_the_codes_of_an_image(pipeline: GlmImagePipeline) -> None:
    model = pipeline.vision_language_encoder
    source = Image.fromarray(world.draw(POSTER, 256, 256))
    inputs = pipeline.processor.image_processor([source], return_tensors="pt")
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        read = model.get_image_tokens(torch.cat(features), inputs["image_grid_thw"]).view(8, 8).numpy()
    expected = world.plan(POSTER, 8, 8, from_pixels=world.ZONES)
    assert (read == expected).mean() > 0.95
    assert (read[1, 1:6] == codes.pixel_text(5)).all()


def test_edit_in_the_pipeline(pipeline: GlmImagePipeline, nano: GlmImage) -> None:
    source = Image.fromarray(world.draw(POSTER, 256, 256))
    [made] = pipeline(
        prompt="make the star pink", image=[source], width=256, height=256, generator=torch.Generator().manual_seed(0),
        num_inference_steps=nano.defaults.num_inference_steps, guidance_scale=nano.defaults.guidance_scale,
        return_dict=False,
    )[0]  # fmt: skip
    found = reading.read(np.asarray(made.convert("RGB")))
    assert found.shapes == (Shape(3, 7, large=True),)
    assert found.background == POSTER.background
