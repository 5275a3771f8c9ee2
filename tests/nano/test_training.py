"""The training recipe: steps of every part, resuming, and the checkpoint of all parts."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import GlmImagePipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, GlmImageForConditionalGeneration

from benchmarks import nano_plans
from benchmarks.nano_scores import held_out_cases
from engine.jobs.job import JobSpec
from models.nano import CHECKPOINT
from models.nano.recipe import (
    __main__ as recipe,
)
from models.nano.recipe import (
    autoencoder,
    batches,
    codes,
    continuation,
    glyphs,
    latents,
    phrases,
    planner,
    planning,
    reading,
    renderer,
    samples,
    vision,
    world,
)
from models.nano.recipe.assemble import assemble
from models.nano.recipe.loop import IGNORED, Losses, train, trained
from models.nano.recipe.planner_sequences import SequenceSampler, collate
from models.nano.recipe.tokenizer import in_bytes, make_tokenizer, string_token
from tests.checkpoints import load, small_engine

# What torch's compiler imports when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Disable compilation, which takes longer than the few steps here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def small_training(folder: Path, steps: int, average: float | None) -> dict[str, Tensor]:
    torch.manual_seed(5)
    module = nn.Linear(4, 1)

    def loss_of(step: int, rng: Random) -> tuple[Tensor, Losses]:
        x = torch.randn(8, 4) + rng.random()
        loss = (module(x) - x.sum(1, keepdim=True)).square().mean()
        return loss, {"loss": loss.item()}

    train("small", module, loss_of, folder, steps=steps, learning_rate=0.1, average=average)
    return trained(folder, "small")


@pytest.mark.parametrize("average", [None, 0.9])
def test_resumed_training_gives_the_same_weights(
    tmp_path: Path, average: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = small_training(tmp_path / "straight", 12, average)
    original = torch.save
    monkeypatch.setattr("models.nano.recipe.loop.SAVE_EVERY_S", -1.0)

    class Stop(Exception): ...

    def save_then_stop(state: dict[str, Any], path: Path) -> None:
        original(state, path)
        if state["step"] == 7:
            raise Stop

    monkeypatch.setattr(torch, "save", save_then_stop)
    with pytest.raises(Stop):
        small_training(tmp_path / "stopped", 12, average)
    monkeypatch.setattr(torch, "save", original)
    resumed = small_training(tmp_path / "stopped", 12, average)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def test_long_strings_are_a_token_for_length_and_half_of_the_alphabet(tokenizer: Any) -> None:
    def tokens(prompt: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)

    expected = [in_bytes(string_token(*each)) for each in ((12, "a"), (14, "n"), (14, "a"), (10, "s"))]
    assert tokens("'GOOD MORNING' \"Zebra crossing\" “Grand opening night” 「Summer Bal」") == expected
    assert len(tokenizer) <= 7552  # rows of the table in 30 MB
    words = {*phrases.COLOUR_WORDS, *phrases.SHAPE_WORDS, *codes.COLOURS, *codes.SHAPES, *phrases.LARGE, *phrases.SMALL}
    assert words <= {*tokens(" ".join(words))}


def test_facts_of_a_prompt_are_targets_of_the_tokens_after_it(tokenizer: Any) -> None:
    sampler, rng = SequenceSampler(tokenizer), Random(3)
    for _ in range(50):
        sequence = sampler.generation(rng, 8, 8, None)
        end = next(i for i, hint in enumerate(sequence.hints["length"]) if hint != IGNORED)
        names = tokenizer.convert_ids_to_tokens(sequence.tokens)
        assert names[end] == "<sop>"
        plan = np.array(sequence.tokens[-65 + 1 :]).reshape(8, 8)
        length, bar = sequence.hints["length"][end], sequence.hints["bar"][end]
        assert codes.is_text(plan[1]).any() == (length > 0)
        assert bar in (0, codes.factors(int(plan[1, 0]))[1])
        background = sequence.hints["background"][end + 7]
        assert background in (IGNORED, 1 + plan[0, 0])


def test_planner_matches_the_published_module(tokenizer: Any) -> None:
    torch.manual_seed(1)
    model, draw = planner.TrainedPlanner(tokenizer), SequenceSampler(tokenizer)
    reference = GlmImageForConditionalGeneration(planner.make_config(tokenizer)).eval().bfloat16()
    text: nn.Module = reference.model.language_model
    text.load_state_dict(model.text.state_dict() | {"embed_tokens.weight": model.embedding()})
    sequence = draw.generation(Random(1), 8, 8, None)
    ids, positions, *_ = collate([sequence], len(sequence.tokens), 0)
    with torch.no_grad():
        expected = text(input_ids=ids, position_ids=positions).last_hidden_state
        output, _ = model.bfloat16()(ids, positions)
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()


def test_hint_targets_of_a_poster() -> None:
    poster = world.Poster(5, world.Line("AB"), None, (world.Shape(3, 2, large=True),))
    hints = batches.hints_of(poster, 8, 8)
    assert hints.shape == (16, 16, 5)
    left_place, right_place, left_letter, right_letter, part = np.moveaxis(hints, -1, 0)
    [line], [shape] = world.place(poster, 8, 8)
    row, column = line.y // 16, line.x // 16
    # Two letters of 24 pixels over three tokens of 16: the border is in the middle of the second.
    assert left_place[row, column : column + 4].tolist() == [0, 0, 1, batches.NO_PLACE]
    assert right_place[row, column : column + 4].tolist() == [0, 1, 1, batches.NO_PLACE]
    assert left_letter[row + 1, column : column + 3].tolist() == [0, 0, 1]
    assert right_letter[row + 1, column : column + 3].tolist() == [0, 1, 1]
    assert left_letter[row + 2, column] == batches.NO_LETTER
    top, left = 2 * shape.row, 2 * shape.column
    assert part[top : top + 4, left : left + 2].tolist() == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert (part != batches.IGNORED).sum() == 64
    large = batches.hints_of(poster, 16, 16)[..., 4]
    assert set(np.unique(large)) == {batches.IGNORED, *range(4, 20)}


def test_continued_planner_starts_with_the_weights_of_the_checkpoint(tokenizer: Any) -> None:
    state = load_file(CHECKPOINT / "vision_language_encoder" / "model.safetensors")
    rows, head = state["model.language_model.embed_tokens.weight"].float(), state["lm_head.weight"].float()
    model = planner.TrainedPlanner(tokenizer)
    continuation.load_planner(model, tokenizer, CHECKPOINT)
    old = AutoTokenizer.from_pretrained(CHECKPOINT / "processor").get_vocab()
    new = {name: index for name, index in tokenizer.get_vocab().items() if index not in codes.LONG_LINE}
    names = sorted(old.keys() & new.keys())
    assert {"poster", "headline", in_bytes(string_token(5, "h"))} <= {*names}
    expected, found = rows[[old[name] for name in names]], model.embedding()[[new[name] for name in names]]
    assert torch.allclose(found, expected, atol=1e-4)
    kept = [code for code in range(codes.CODEBOOK) if code not in codes.LONG_LINE]
    assert torch.allclose(model.head()[kept], head[kept], atol=1e-4)


def test_sampled_plans_of_the_shipped_planner_are_as_the_prompts_say(tokenizer: Any) -> None:
    """Sample with kept keys and values, as the engine does: a wrong position or mask would spoil nearly all plans."""
    model = planner.TrainedPlanner(tokenizer)
    continuation.load_planner(model, tokenizer, CHECKPOINT)
    cases = held_out_cases(8, seed=0)
    prompts = [case.prompt for case in cases]

    def encode(text: str) -> list[int]:
        return tokenizer.backend_tokenizer.encode(text).ids

    plans = planning.sample_plans(model, encode, prompts, 8, 8, seed=1, temperature=0.5, top_p=0.75)
    counts, wrong = nano_plans.score(cases, [plans])
    assert counts["whole"] >= 6, wrong


def test_continued_training_makes_a_checkpoint_that_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "PER_SHARD", 4)
    monkeypatch.setattr(samples, "PER_SHARD", 2)
    monkeypatch.setattr(recipe, "SHARDS", dict.fromkeys(recipe.SHARDS, 1))
    monkeypatch.setattr(recipe, "SAMPLE_SHARDS", {(256, 256): 1})
    monkeypatch.setattr(recipe, "EDIT_SHARDS", 1)
    monkeypatch.setattr(recipe, "SAMPLE_STEPS", 1)
    monkeypatch.setattr(recipe.Continuation, "HINT_STEPS", 1)
    monkeypatch.setattr(recipe.Continuation, "PLANNER_STEPS", 1)
    monkeypatch.setattr(recipe.Continuation, "RENDERER_STEPS", 1)
    training = recipe.Continuation(tmp_path / "work", tmp_path / "checkpoint", CHECKPOINT)
    training.latents()
    training.assemble()
    # One step changes little: the new checkpoint still draws as the old one.
    prompt = 'a blue poster, headline "HI", center a large yellow star'
    spec = JobSpec(prompt=prompt, width=256, height=256, num_inference_steps=4, guidance_scale=2.5, seed=1)
    [[image]] = small_engine(load(tmp_path / "checkpoint")).generate([spec])
    poster = reading.read(image.numpy())
    assert poster.background == codes.COLOURS.index("blue")
    assert {shape.kind for shape in poster.shapes} <= {codes.SHAPES.index("star")}


def test_training_makes_a_checkpoint_that_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    """Take a few steps of every part, then write, load and run the checkpoint."""
    monkeypatch.setattr(latents, "PER_SHARD", 4)
    monkeypatch.setattr(samples, "PER_SHARD", 2)
    work, out = tmp_path / "work", tmp_path / "checkpoint"
    model = autoencoder.train_on_crops(work, 1)
    for size in ((256, 256), (384, 256), (256, 384), (512, 512)):
        latents.make_shard(model, work, *size, edits=False, index=0)
    latents.make_shard(model, work, 256, 256, edits=False, index=1)
    latents.make_shard(model, work, 256, 256, edits=True, index=0)
    glyphs.train_glyphs(work, 2)
    statistics = latents.statistics(work)
    trained_renderer = renderer.train_renderer(glyphs.trained_encoder(work), work, *statistics, 1, 4)
    samples.make_shard(trained_renderer, work, (256, 256), 0, *statistics)
    parts = (
        planner.train_planner(tokenizer, work, 5, 6, 2),
        vision.train_vision(GlmImageForConditionalGeneration(planner.make_config(tokenizer)), work, 2),
        trained_renderer,
        samples.train_decoder(autoencoder.train_decoder(model, work, 1), work, {(256, 256): 1}, 2),
    )
    assemble(out, *parts, *statistics)
    assert sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) < 30e6

    engine = small_engine(load(out))
    spec = JobSpec(prompt='a red poster, headline "HI"', width=256, height=256, num_inference_steps=2, seed=1)
    [[image]] = engine.generate([spec])
    assert image.shape == (256, 256, 3)
    pipeline = GlmImagePipeline.from_pretrained(out, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    source = Image.fromarray(world.draw(world.Poster(3), 256, 256))
    [edited] = pipeline(
        prompt="make it red", image=[source], height=256, width=256, num_inference_steps=1, return_dict=False
    )[0]
    assert edited.size == (256, 256)
