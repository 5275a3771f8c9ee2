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
from torch import Tensor, nn
from transformers import GlmImageForConditionalGeneration

from engine.jobs.job import JobSpec
from models.nano.recipe import autoencoder, batches, glyphs, latents, planner, renderer, samples, vision, world
from models.nano.recipe.assemble import assemble
from models.nano.recipe.loop import Losses, train, trained
from models.nano.recipe.planner_sequences import SequenceSampler, collate
from models.nano.recipe.tokenizer import make_tokenizer
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


def test_planner_matches_the_published_module() -> None:
    torch.manual_seed(1)
    tokenizer = make_tokenizer()
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


def test_training_makes_a_checkpoint_that_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a few steps of every part, then write, load and run the checkpoint."""
    monkeypatch.setattr(latents, "PER_SHARD", 4)
    monkeypatch.setattr(samples, "PER_SHARD", 2)
    work, out = tmp_path / "work", tmp_path / "checkpoint"
    model = autoencoder.train_on_crops(work, 1)
    for size in ((256, 256), (384, 256), (256, 384), (512, 512)):
        latents.make_shard(model, work, *size, edits=False, index=0)
    latents.make_shard(model, work, 256, 256, edits=False, index=1)
    latents.make_shard(model, work, 256, 256, edits=True, index=0)
    tokenizer = make_tokenizer()
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
