"""Edits against the reference pipeline: codes of source images, prompt, plan and pixels."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import GlmImagePipeline
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from PIL import Image

from engine.jobs.job import JobSpec, Plan
from engine.request import Failed, Planned, Rendered, Request
from models.glm_image.model import GlmImage
from tests.checkpoints import load, small_engine, write_variant
from tests.source_images import source_image, source_images


@dataclass
class Edit:
    """An edit and the engine's result."""

    spec: JobSpec
    sources: list[Image.Image]
    request: Request = field(init=False)
    plan: Plan = field(init=False)
    pixels: np.ndarray = field(init=False)


def edits() -> list[Edit]:
    return [
        Edit(
            JobSpec("make it 'RED'", 128, 96, seed=1, num_inference_steps=3, num_sources=1), [source_image(1, 160, 128)]
        ),
        Edit(
            JobSpec("both, greedy", 96, 128, seed=2, num_inference_steps=4, num_sources=2, temperature=0.0),
            [source_image(2, 64, 160), source_image(3, 192, 96)],
        ),
        Edit(
            JobSpec('all "OF" them', 128, 128, seed=3, num_inference_steps=3, num_sources=3, guidance_scale=4.0),
            [source_image(4, 128, 64), source_image(5, 64, 64), source_image(6, 106, 143)],  # the last is off the grid
        ),
        Edit(
            JobSpec("no guidance", 64, 96, seed=4, num_inference_steps=2, num_sources=1, guidance_scale=1.0),
            [source_image(7, 96, 96)],
        ),
    ]


class Pair:
    """One checkpoint in both implementations, and our results of the edits, in one batch with generations."""

    def __init__(self, folder: Path):
        self.ours = load(folder)
        self.reference = GlmImagePipeline.from_pretrained(folder, dtype=torch.float32)
        self.reference.set_progress_bar_config(disable=True)
        self.edits = edits()
        engine = small_engine(self.ours)
        for number, edit in enumerate(self.edits):
            given = source_images(*edit.sources)
            edit.request = Request(
                str(number), edit.spec, source_images=given, preprocessed=engine.preprocess_images(given)
            )
            engine.submit(edit.request)
            engine.submit(Request(f"generation-{number}", JobSpec("a 'B'", 96, 64, seed=9, num_inference_steps=3)))
        while not engine.is_idle:
            for event in engine.step():
                assert not isinstance(event, Failed), event.error
                if isinstance(event, Planned) and event.request.id.isdigit():
                    self.edits[int(event.request.id)].plan = event.plan
                if isinstance(event, Rendered) and event.image.request.id.isdigit():
                    self.edits[int(event.image.request.id)].pixels = event.pixels.numpy()


@pytest.fixture(scope="module", params=["plain", "head-dim-24"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    write_variant(folder, request.param)
    return Pair(folder)


def reference_inputs(pipeline: GlmImagePipeline, edit: Edit) -> dict[str, torch.Tensor]:
    content = [{"type": "image", "image": image} for image in edit.sources]
    return pipeline.processor.apply_chat_template(
        [[{"role": "user", "content": [*content, {"type": "text", "text": edit.spec.prompt}]}]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"target_h": edit.spec.height, "target_w": edit.spec.width},
    )


@torch.no_grad()
def reference_codes(pipeline: GlmImagePipeline, edit: Edit) -> list[torch.Tensor]:
    """Return [rows, cols] for every source image."""
    inputs, model = reference_inputs(pipeline, edit), pipeline.vision_language_encoder
    grids = inputs["image_grid_thw"][: len(edit.sources)]
    features = model.get_image_features(inputs["pixel_values"], grids).pooler_output
    codes = model.get_image_tokens(torch.cat(features), grids)
    parts = codes.split(grids.prod(-1).tolist())
    return [part.view(*grid[1:].tolist()) for part, grid in zip(parts, grids, strict=True)]


@pytest.mark.parametrize("number", range(len(edits())))
def test_codes_of_the_sources_are_the_reference_s(pair: Pair, number: int) -> None:
    edit = pair.edits[number]
    wanted = reference_codes(pair.reference, edit)
    assert all(torch.equal(s.codes, codes) for s, codes in zip(edit.request.encoded, wanted, strict=True))
    assert len(set(torch.cat([codes.flatten() for codes in wanted]).tolist())) > 5
    assert edit.request.source_tokens == sum(codes.numel() for codes in wanted)


@pytest.mark.parametrize("number", range(len(edits())))
def test_prompt_and_positions_are_the_reference_s(pair: Pair, number: int) -> None:
    edit = pair.edits[number]
    inputs, model = reference_inputs(pair.reference, edit), pair.reference.vision_language_encoder.model
    ids = inputs["input_ids"][0].clone()
    ids[ids == model.config.image_token_id] = torch.cat([source.codes.flatten() for source in edit.request.encoded])
    assert edit.request.prompt_ids == ids.tolist()
    positions, _ = model.get_rope_index(inputs["input_ids"], inputs["image_grid_thw"], inputs["images_per_sample"])
    assert edit.request.prompt_positions is not None
    assert torch.equal(edit.request.prompt_positions, positions[:, 0].T)


@torch.no_grad()
def reference_logits(pipeline: GlmImagePipeline, edit: Edit) -> torch.Tensor:
    """Return the reference's scores [tokens, codes] for each token of the plan, given the tokens before it."""
    inputs, planner = reference_inputs(pipeline, edit), pipeline.vision_language_encoder
    planner.model.rope_deltas = None
    out = planner(**inputs, use_cache=True)
    rows, cache = [out.logits[0, -1]], out.past_key_values
    for token in edit.plan.tokens[:-1]:
        out = planner(
            input_ids=torch.tensor([[token]]),
            past_key_values=cache,
            use_cache=True,
            image_grid_thw=inputs["image_grid_thw"],
            images_per_sample=inputs["images_per_sample"],
        )
        rows.append(out.logits[0, -1])
    return torch.stack(rows)[:, : planner.config.vq_config.num_embeddings].float()


@pytest.mark.parametrize("number", range(len(edits())))
def test_every_token_of_a_plan_is_the_reference_s(pair: Pair, number: int) -> None:
    edit = pair.edits[number]
    assert edit.plan.preview is None
    assert len(edit.plan.tokens) == edit.spec.geometry.plan.tokens
    logits = reference_logits(pair.reference, edit)
    chosen = logits.gather(1, torch.tensor(edit.plan.tokens)[:, None])
    if edit.spec.temperature == 0:
        assert float((logits.max(1, keepdim=True).values - chosen).max()) <= 1e-4
    else:
        probability = torch.softmax(logits / pair.ours.sampling.temperature, -1)
        likelier = (probability * (logits > chosen)).sum(-1)
        assert float(likelier.max()) <= pair.ours.sampling.top_p + 0.01


def reference_pixels(pair: Pair, edit: Edit, sources: list[Image.Image]) -> np.ndarray:
    """Return the reference's image for our plan and noise, with these sources."""
    pipeline, plan, spec = pair.reference, edit.plan, edit.spec
    prior = torch.tensor(plan.tokens).view(plan.rows, plan.cols).repeat_interleave(2, 0).repeat_interleave(2, 1)
    codes = reference_codes(pipeline, Edit(spec, sources))
    upsampled = [c.repeat_interleave(2, 0).repeat_interleave(2, 1) for c in codes]
    shape = (1, pipeline.transformer.config.in_channels, spec.height // 8, spec.width // 8)
    images = pipeline(
        prompt=spec.prompt,
        image=sources,
        height=spec.height,
        width=spec.width,
        num_inference_steps=spec.num_inference_steps,
        guidance_scale=spec.guidance_scale,
        latents=torch.randn(shape, generator=torch.Generator().manual_seed(spec.seed)),
        prior_token_ids=prior.reshape(1, -1),
        prior_token_image_ids=[torch.cat([u.flatten() for u in upsampled])],
        source_image_grid_thw=[torch.tensor([[1, *u.shape] for u in upsampled])],
    ).images  # pyright: ignore[reportAttributeAccessIssue]
    return np.asarray(images[0], float)


@pytest.mark.parametrize("number", range(len(edits())))
def test_pixels_are_the_reference_s_for_the_same_plan_and_noise(pair: Pair, number: int) -> None:
    edit = pair.edits[number]
    error = np.mean((reference_pixels(pair, edit, edit.sources) - edit.pixels) ** 2)
    assert error < 255**2 / 10**5.5  # 55 dB
    others = [source_image(99, *image.size) for image in edit.sources]
    assert error < 0.05 * np.mean((reference_pixels(pair, edit, others) - edit.pixels) ** 2)  # it depends on them


@torch.no_grad()
def test_keys_and_values_of_a_source_are_the_reference_s(pair: Pair) -> None:
    """Compare them in every layer with the reference's cache."""
    edit, reference = pair.edits[0], pair.reference.transformer
    [source] = edit.request.encoded
    cache = GlmImageKVCache(num_layers=reference.config.num_layers)
    cache.set_mode("write")
    codes = source.codes.repeat_interleave(2, 0).repeat_interleave(2, 1).reshape(1, -1)
    reference(
        hidden_states=source.latents[None],
        encoder_hidden_states=torch.zeros(1, 0, reference.config.text_embed_dim),
        prior_token_id=codes,
        prior_token_drop=torch.zeros_like(codes, dtype=torch.bool),
        timestep=torch.zeros(1),
        target_size=torch.tensor([[128, 160]]),
        crop_coords=torch.zeros(1, 2),
        kv_caches=cache,
    )
    source_kv = small_engine(pair.ours).renderer.runner.source_kv.of(edit.request)
    assert source_kv is not None
    for layer, theirs in zip(source_kv, cache.caches, strict=True):
        [keys], [values] = theirs.k_caches, theirs.v_caches
        assert keys is not None
        assert values is not None
        wanted = torch.cat([keys, values]).transpose(1, 2)
        torch.testing.assert_close(layer, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_latents_of_a_source_are_the_reference_s(model: GlmImage) -> None:
    vae = model.autoencoder.vae
    [read] = small_engine(model).preprocess_images(source_images(source_image(8, 96, 64)))
    wanted = vae.encode(read.pixels[None] / 127.5 - 1).latent_dist.mode()[0]  # type: ignore[union-attr]
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))  # type: ignore[attr-defined]
    torch.testing.assert_close(model.autoencoder.encode(read.pixels), (wanted - mean) / std, rtol=1e-4, atol=1e-5)
