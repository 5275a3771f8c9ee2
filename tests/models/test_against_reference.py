"""Every network against the reference packages, on random checkpoints of several shapes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import GlmImagePipeline, GlmImageTransformer2DModel
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

from engine.jobs.job import JobSpec, Plan
from engine.request import Planned, Rendered, Request
from models.glm_image.config import PlannerConfig, RendererConfig
from models.glm_image.model import planner_key
from models.glm_image.planner import Planner
from models.glm_image.random_weights import VISION, VQ, random_glm_image
from models.glm_image.render_operations import RendererBatch
from models.glm_image.renderer import Renderer, patchify, rotary_angles, stack_modulations, unpatchify
from models.glm_image.vision import VisionTokenizer, vision_key
from tests.checkpoints import VARIANTS, load, small_engine, write_variant
from tests.source_images import source_image, source_images

SPECS = [
    JobSpec("a poster, top headline \"HELLO\", bottom 'bye'", 128, 128, seed=1, num_inference_steps=4),
    JobSpec("a red circle, no text", 192, 128, seed=2, num_inference_steps=7, temperature=0.0),
    JobSpec(
        'wide \u201cONE\u201d "TWO THREE" \u300cx\u300d', 256, 96, seed=3, num_inference_steps=3, guidance_scale=4.0
    ),
    JobSpec("tall, without guidance", 96, 224, seed=4, num_inference_steps=5, guidance_scale=1.0, temperature=0.0),
]


class Pair:
    """One checkpoint in both implementations, and our results of `SPECS`, in one batch."""

    def __init__(self, folder: Path):
        self.ours = load(folder)
        self.reference = GlmImagePipeline.from_pretrained(folder, dtype=torch.float32)
        self.reference.set_progress_bar_config(disable=True)
        self.plans: dict[str, Plan] = {}
        self.pixels: dict[str, np.ndarray] = {}
        engine = small_engine(self.ours)
        for number, spec in enumerate(SPECS):
            engine.submit(Request(str(number), spec))
        while not engine.is_idle:
            for event in engine.step():
                if isinstance(event, Planned):
                    self.plans[event.request.id] = event.plan
                if isinstance(event, Rendered):
                    self.pixels[event.image.request.id] = event.pixels.numpy()


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    write_variant(folder, request.param)
    return Pair(folder)


@torch.no_grad()
def reference_logits(pipeline: GlmImagePipeline, spec: JobSpec, tokens: list[int]) -> torch.Tensor:
    """Return the reference's scores [tokens, codes] for each token of a plan, given the tokens before it."""
    geometry = spec.geometry
    inputs = pipeline.processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "text", "text": spec.prompt}]}]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"target_h": geometry.canvas_height, "target_w": geometry.canvas_width},
    )
    planner = pipeline.vision_language_encoder
    planner.model.rope_deltas = None
    out = planner(**inputs, use_cache=True)
    rows, cache = [out.logits[0, -1]], out.past_key_values
    for token in tokens[:-1]:
        out = planner(
            input_ids=torch.tensor([[token]]),
            past_key_values=cache,
            use_cache=True,
            image_grid_thw=inputs["image_grid_thw"],
        )
        rows.append(out.logits[0, -1])
    return torch.stack(rows)[:, : planner.config.vq_config.num_embeddings].float()


@pytest.mark.parametrize("number", range(len(SPECS)))
def test_every_token_of_a_plan_is_the_reference_s(pair: Pair, number: int) -> None:
    spec, plan = SPECS[number], pair.plans[str(number)]
    assert plan.preview is not None
    tokens = plan.preview.tokens + plan.tokens
    assert len(tokens) == spec.geometry.plan_tokens
    logits = reference_logits(pair.reference, spec, tokens)
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])
    if spec.temperature == 0:
        assert float((logits.max(1, keepdim=True).values - chosen).max()) <= 1e-4
    else:
        probability = torch.softmax(logits / pair.ours.sampling.temperature, -1)
        likelier = (probability * (logits > chosen)).sum(-1)
        assert float(likelier.max()) <= pair.ours.sampling.top_p + 0.01


@pytest.mark.parametrize("number", range(len(SPECS)))
def test_pixels_are_the_reference_s_for_the_same_plan_and_noise(pair: Pair, number: int) -> None:
    spec, plan = SPECS[number], pair.plans[str(number)]
    prior = torch.tensor(plan.tokens).view(plan.rows, plan.cols).repeat_interleave(2, 0).repeat_interleave(2, 1)
    channels = pair.reference.transformer.config.in_channels
    shape = (1, channels, spec.height // 8, spec.width // 8)
    want = pair.reference(
        prompt=spec.prompt,
        height=spec.height,
        width=spec.width,
        num_inference_steps=spec.num_inference_steps,
        guidance_scale=spec.guidance_scale,
        latents=torch.randn(shape, generator=torch.Generator().manual_seed(spec.seed)),
        prior_token_ids=prior.reshape(1, -1),
    ).images[0]  # pyright: ignore[reportAttributeAccessIssue]
    error = np.mean((np.asarray(want, float) - pair.pixels[str(number)]) ** 2)
    assert error < 255**2 / 10**5.5  # 55 dB


@torch.no_grad()
def test_renderer_layer_by_layer(pair: Pair) -> None:
    """Compare both hidden streams after every layer, and the velocity."""
    ours, reference = pair.ours.renderer, pair.reference.transformer
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(ours.config.in_channels, 12, 16, generator=draw)
    codes = torch.randint(ours.config.prior_vq_quantizer_codebook_size, (3, 4), generator=draw)
    glyphs = pair.ours.glyphs.encode(["HELLO"])
    states: tuple[list, list] = ([], [])
    hooks = [
        layer.register_forward_hook(lambda module, args, out: states[0].append(torch.cat([out[1], out[0]], dim=1)[0]))
        for layer in reference.transformer_blocks
    ] + [
        layer.register_forward_hook(lambda module, args, out: states[1].append(out.clone()))
        for layer in ours.transformer_blocks
    ]
    upsampled = codes.repeat_interleave(2, 0).repeat_interleave(2, 1).reshape(1, -1)
    want = reference(
        hidden_states=latents[None],
        encoder_hidden_states=glyphs[None],
        prior_token_id=upsampled,
        prior_token_drop=torch.zeros_like(upsampled, dtype=torch.bool),
        timestep=torch.tensor([499.0]),
        target_size=torch.tensor([[96.0, 128.0]]),
        crop_coords=torch.zeros(1, 2),
        return_dict=False,
    )[0][0]
    text, patches = len(glyphs), 48
    x = torch.cat([ours.glyphs(glyphs), ours.patches(patchify(latents)) + ours.plan(codes)])
    angles = torch.cat(
        [torch.zeros(text, ours.config.attention_head_dim), rotary_angles(6, 8, ours.config.attention_head_dim)]
    )
    batch = RendererBatch([text + patches], torch.tensor([1] * text + [0] * patches), angles.cos(), angles.sin())
    modulations = ours.modulations(ours.time_embeddings(torch.tensor([500.0]), 96, 128))
    got = ours(x, stack_modulations(modulations), batch)[text:]
    for hook in hooks:
        hook.remove()
    assert len(states[0]) == len(states[1]) == ours.config.num_layers
    for theirs, mine in zip(*states, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(unpatchify(got, 6, 8), want, rtol=1e-4, atol=1e-4)


def test_published_sizes_have_the_reference_s_names_and_shapes() -> None:
    with torch.device("meta"):
        theirs = GlmImageForConditionalGeneration(GlmImageConfig())
        ours = Planner(PlannerConfig())
        their_renderer = GlmImageTransformer2DModel(num_attention_heads=32, attention_head_dim=128)
        our_renderer = Renderer(RendererConfig())
        our_vision = VisionTokenizer.from_json({})
    renamed = {planner_key(key): value.shape for key, value in theirs.state_dict().items()}
    renamed.pop(None)
    assert {key: value.shape for key, value in ours.state_dict().items()} == renamed
    vision = {vision_key(key): value.shape for key, value in theirs.state_dict().items()}
    vision.pop(None)
    assert {key: value.shape for key, value in our_vision.state_dict().items()} == vision
    assert {key: value.shape for key, value in our_renderer.state_dict().items()} == {
        key: value.shape for key, value in their_renderer.state_dict().items()
    }


def test_published_planner_config_is_the_default() -> None:
    written = GlmImageConfig().to_dict()
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
    written["text_config"]["rope_parameters"] = rope
    assert PlannerConfig.from_json(written) == PlannerConfig()


def test_random_model_of_given_sizes_makes_an_image(tmp_path: Path) -> None:
    """Build the model as benchmarks do, without a checkpoint."""
    planner = PlannerConfig(
        vocab_size=20000, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, mrope_section=(4, 2, 2),
    )  # fmt: skip
    renderer = RendererConfig(num_layers=1, num_attention_heads=2, attention_head_dim=16, text_embed_dim=64)
    vision = {"vision_config": VISION, "vq_config": VQ | {"num_embeddings": planner.codebook_size}}
    model = random_glm_image(torch.device("cpu"), torch.bfloat16, planner=planner, renderer=renderer, vision=vision)
    engine = small_engine(model, kv_tokens=2048)
    [[pixels]] = engine.generate([JobSpec('"A"', 64, 64, seed=0, num_inference_steps=1)])
    assert pixels.shape == (64, 64, 3)
    assert pixels.float().std() > 1
    spec = JobSpec('"A"', 64, 64, seed=0, num_inference_steps=1, num_sources=1)
    [[edited]] = engine.generate([spec], [source_images(source_image(1, 64, 64))])
    assert not torch.equal(edited, pixels)
