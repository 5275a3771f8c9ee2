"""The renderer of CPUs: like the plain one, and to the bit the same with any neighbours and threads."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import models.glm_image.cpu_renderer
from engine.jobs.job import JobSpec
from models.glm_image.config import RendererConfig
from models.glm_image.cpu_renderer import CpuRenderer
from models.glm_image.model import GlmImage
from models.glm_image.random_weights import randomise
from models.glm_image.renderer import Renderer, RendererBatch, rotary_angles, stack_modulations
from models.threads import threads
from tests.checkpoints import small_engine

SPEC = JobSpec('a "B"', 64, 96, seed=1, num_inference_steps=2)
IMAGES = [(4, 4, 1, 0), (6, 8, 17, 0), (4, 10, 2, 12), (12, 12, 3, 20)]  # rows, columns, glyph tokens, source tokens
Sequences = list[tuple[int, int, int, int]]


@pytest.fixture(scope="module", name="plain", params=[(16, torch.float32), (24, torch.float32), (16, torch.bfloat16)])
def plain_renderer(request: pytest.FixtureRequest) -> Renderer:
    head_dim, dtype = request.param
    model = Renderer(RendererConfig(num_layers=2, num_attention_heads=4, attention_head_dim=head_dim))
    randomise(model, dtype=dtype, device=torch.device("cpu"), seed=0)
    return model


def inputs(model: Renderer, images: list[int]) -> tuple[Tensor, Tensor, RendererBatch]:
    """Return the branch of every image; equal images have equal inputs."""
    config, dtype = model.config, model.proj_out.weight.dtype
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    lengths, parts, index, angles, sources, modulations = [], [], [], [], [], []
    for number, image in enumerate(images):
        draw = torch.Generator().manual_seed(image)
        rows, cols, glyphs, source = IMAGES[image]
        lengths.append(glyphs + rows * cols)
        parts.append(torch.randn(lengths[-1], config.dim, generator=draw).to(dtype))
        index += glyphs * [2 * number + 1] + rows * cols * [2 * number]
        angles += [torch.zeros(glyphs, head_dim), rotary_angles(rows, cols, head_dim)]
        kv = torch.nn.functional.layer_norm(
            torch.randn(config.num_layers, 2, heads, source, head_dim, generator=draw), (head_dim,)
        )
        sources.append(kv.to(dtype) if source else None)
        temb = model.time_embeddings(torch.tensor([100.0 + image]), 16 * rows, 16 * cols)
        modulations.append(model.modulations(temb)[0])
    table = torch.cat(angles)
    batch = RendererBatch(lengths, torch.tensor(index), table.cos(), table.sin(), source_kv=sources)
    return torch.cat(parts), stack_modulations(modulations), batch


def velocities(network: CpuRenderer, images: list[int]) -> list[Tensor]:
    x, modulations, batch = inputs(network._model, images)
    return list(network(x, modulations, batch).split(list(batch.lengths)))


@torch.inference_mode()
def test_it_is_the_plain_renderer_up_to_rounding(plain: Renderer) -> None:
    x, modulations, batch = inputs(plain, [0, 1, 2, 3])
    ours = CpuRenderer(plain)(x, modulations, batch).float()
    expected = plain.float()(x.float(), modulations.float(), float_sources(batch))
    dtype = modulations.dtype
    plain.to(dtype)
    assert float((ours - expected).abs().max() / expected.abs().max()) < (1e-5 if dtype == torch.float32 else 0.03)


def float_sources(batch: RendererBatch) -> RendererBatch:
    sources = [None if kv is None else kv.float() for kv in batch.source_kv]
    return RendererBatch(batch.lengths, batch.modulation_index, batch.cos, batch.sin, source_kv=sources)


@torch.inference_mode()
def test_neighbours_and_threads_change_no_bit(plain: Renderer) -> None:
    networks = []
    for count in (1, 2, 3, 8):
        with threads(count):
            networks.append(CpuRenderer(plain))
    alone = [velocities(networks[0], [image])[0] for image in range(len(IMAGES))]

    @given(st.sampled_from(networks), st.lists(st.integers(0, len(IMAGES) - 1), min_size=1, max_size=6))
    def holds(network: CpuRenderer, images: list[int]) -> None:
        for image, velocity in zip(images, velocities(network, images), strict=True):
            assert torch.equal(velocity, alone[image])

    holds()


@torch.inference_mode()
@pytest.mark.parametrize("images", [[3], [0, 1, 2]])
def test_a_failure_in_any_part_ends_the_step_and_not_the_next(
    plain: Renderer, images: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with threads(3):
        network = CpuRenderer(plain)
    expected, real = velocities(network, images), network._before
    for failing in range(1, 4):
        calls = itertools.count(1)

        def fails(*arguments: object, failing: int = failing, calls: itertools.count = calls) -> None:
            if next(calls) == failing:
                raise MemoryError("planted")
            real(*arguments)

        monkeypatch.setattr(network, "_before", fails)
        with pytest.raises(MemoryError, match="planted"):
            velocities(network, images)
        monkeypatch.setattr(network, "_before", real)
        assert all(map(torch.equal, velocities(network, images), expected))


def test_a_product_that_is_missing_wrong_or_depends_on_its_rows_is_not_used(
    model: GlmImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = models.glm_image.cpu_renderer.product
    engine = small_engine(model)
    assert engine.renderer.runner.fallbacks == {}
    [[expected]] = engine.generate([SPEC])

    def missing(*_: object, **__: object) -> Tensor:
        raise AttributeError("no such operator")

    for wrong, reason in (
        (missing, "no such operator"),
        (lambda x, *rest, **options: real(x, *rest, **options) * 1.001, "differs from torch"),
        (lambda x, *rest, **options: real(x, *rest, **options) * (1 + 1e-6 * (len(x) < 100)), "depend on their number"),
    ):
        monkeypatch.setattr(models.glm_image.cpu_renderer, "product", wrong)
        engine = small_engine(model)
        assert reason in engine.renderer.runner.fallbacks["onednn"]
        [[pixels]] = engine.generate([SPEC])
        assert (pixels.int() - expected.int()).abs().max() <= 1


def test_every_layer_gives_a_sign_of_life(model: GlmImage) -> None:
    engine = small_engine(model)
    engine.generate([SPEC])
    beats: list[int] = []
    rendering = engine.renderer.runner
    advance = rendering.advance

    def counted(images: list) -> None:
        before = len(beats)
        advance(images)
        assert len(beats) - before >= len(model.renderer.transformer_blocks)

    rendering.advance = counted  # type: ignore[method-assign]
    engine.on_progress(lambda: beats.append(1))
    engine.generate([SPEC])
    engine.on_progress(lambda: None)
    assert beats


@torch.inference_mode()
def test_buffers_live_as_long_as_their_batch(plain: Renderer) -> None:
    network = CpuRenderer(plain)
    x, modulations, batch = inputs(plain, [0, 1])
    network(x, modulations, batch)
    assert network._planned is not None
    del batch
    assert network._planned is None
