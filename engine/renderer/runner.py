"""Builds the renderer's tensors and runs it. What it runs is the scheduler's decision."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from engine.renderer.timesteps import initial_noise, schedule
from engine.request import Image, Request
from models.glm_image.model import GlmImage
from models.glm_image.prompt import quoted_strings
from models.glm_image.renderer import MODULATION_ROWS, RowLayout, patchify, rotary_angles, unpatchify
from models.row_blocks import elementwise, padded, row_block

ROWS = 256  # rows of a matrix product on CPU


@dataclass(eq=False)
class Rendering:
    """An image being rendered: what all its steps share, and how far it is.

    Args:
        latents: [patches, P] float32, changed by every step.
        plan: [patches, dim] the plan, embedded.
        glyphs: [g, dim] glyph tokens of the conditional row.
        no_glyphs: the unconditional row's; None without guidance.
        time_embeddings: [steps, E].
        sigmas: [steps + 1] float32, on the CPU.
        angles: rotary angles [patches, D].
    """

    image: Image
    latents: Tensor
    plan: Tensor
    glyphs: Tensor
    no_glyphs: Tensor | None
    time_embeddings: Tensor
    sigmas: Tensor
    angles: Tensor
    step: int = 0

    @property
    def request(self) -> Request:
        return self.image.request

    @property
    def steps(self) -> int:
        return self.time_embeddings.shape[0]

    @property
    def steps_left(self) -> int:
        return self.steps - self.step

    @property
    def patches(self) -> int:
        return self.latents.shape[0]

    @property
    def rows(self) -> list[Tensor]:
        """The glyph tokens of the image's rows, the conditional one first."""
        return [self.glyphs] if self.no_glyphs is None else [self.glyphs, self.no_glyphs]

    @property
    def tokens(self) -> int:
        return sum(len(glyphs) + self.patches for glyphs in self.rows)

    @property
    def deadline(self) -> float:
        return self.image.request.deadline


@dataclass(frozen=True)
class PackedBatch:
    """The layout of a set of images, kept while the same set goes on.

    Args:
        patch_spans: for every image the (start, end) of the patches of each of its rows in the packed tensor.
    """

    renderings: list[Rendering]
    layout: RowLayout
    patch_spans: list[list[tuple[int, int]]]
    size: int


class RendererRunner:
    """Prepares images, advances sets of them by one step, and decodes the finished ones."""

    def __init__(self, model: GlmImage):
        self.model, self.renderer = model, model.renderer
        self.block = row_block(ROWS, model.device)
        self.modulation_block = row_block(MODULATION_ROWS, model.device)
        self._batch: PackedBatch | None = None
        self._angles = lru_cache(maxsize=64)(self._rotary_angles)
        self._glyphs = lru_cache(maxsize=64)(self._glyph_tokens)
        with torch.inference_mode():
            self._no_plan = self.renderer.no_plan()

    @torch.inference_mode()
    def prepare(self, image: Image) -> Rendering:
        """Everything about an image that its steps share. Its plan must be known."""
        spec, geometry = image.request.spec, image.request.spec.geometry
        assert image.plan is not None
        glyphs = self._glyphs(tuple(quoted_strings(spec.prompt)))
        guided = spec.guidance_scale > 1
        no_glyphs = self._glyphs(tuple(quoted_strings(spec.negative_prompt))) if guided else None
        codes = torch.tensor(image.plan.tokens, device=self.model.device).view(image.plan.rows, image.plan.cols)
        timesteps, sigmas = schedule(self.model.scheduler, geometry, spec.num_inference_steps)
        noise = initial_noise(image.seed, self.renderer.config.in_channels, geometry)
        return Rendering(
            image,
            latents=patchify(noise, self.renderer.config.patch_size).to(self.model.device),
            plan=self.renderer.plan(codes),
            glyphs=glyphs,
            no_glyphs=no_glyphs,
            time_embeddings=self.renderer.time_embeddings(
                timesteps.to(self.model.device), geometry.canvas_height, geometry.canvas_width
            ),
            sigmas=sigmas,
            angles=self._angles(geometry.patches.rows, geometry.patches.cols),
        )

    @torch.inference_mode()
    def advance(self, renderings: list[Rendering]) -> None:
        """One denoising step of every image, each at its own timestep. If it raises, no image has changed."""
        batch = self._pack(renderings)
        velocity = self.renderer(
            self._inputs(batch), self._time_embeddings(batch), batch.layout, self.block, self.modulation_block
        )
        moved = [self._euler_step(r, velocity, spans) for r, spans in zip(renderings, batch.patch_spans, strict=True)]
        for rendering, latents in zip(renderings, moved, strict=True):
            rendering.latents = latents
            rendering.step += 1

    def padding(self, tokens: int) -> int:
        """Rows computed for nothing when `tokens` are packed."""
        return padded(tokens, self.block) - tokens

    @torch.inference_mode()
    def decode(self, rendering: Rendering) -> Tensor:
        """Pixels [height, width, 3], uint8, on the CPU, cropped to the size asked for."""
        geometry = rendering.image.request.spec.geometry
        latents = unpatchify(rendering.latents, geometry.patches.rows, geometry.patches.cols)
        left, top, right, bottom = geometry.crop_box
        return self.model.autoencoder.decode(latents)[top:bottom, left:right].contiguous()

    def _inputs(self, batch: PackedBatch) -> Tensor:
        """[T, dim]: every row's glyph tokens, then its patches with the plan (or none) added."""
        latents = torch.cat([r.latents for r in batch.renderings]).to(self.model.dtype)
        rows = padded(latents.shape[0], self.block)
        latents = torch.nn.functional.pad(latents, (0, 0, 0, rows - latents.shape[0]))
        patches = self.renderer.patches(latents, self.block)
        x = patches.new_zeros(batch.size, patches.shape[1])
        first = 0
        for rendering, spans in zip(batch.renderings, batch.patch_spans, strict=True):
            own = patches[first : first + rendering.patches]
            plans = (rendering.plan, self._no_plan)
            for glyphs, plan, (start, end) in zip(rendering.rows, plans, spans, strict=False):
                x[start - len(glyphs) : start] = glyphs
                x[start:end] = own + plan
            first += rendering.patches
        return x

    def _time_embeddings(self, batch: PackedBatch) -> Tensor:
        rows = torch.stack([r.time_embeddings[r.step] for r in batch.renderings])
        return torch.nn.functional.pad(rows, (0, 0, 0, padded(len(rows), self.modulation_block) - len(rows)))

    def _euler_step(self, rendering: Rendering, velocity: Tensor, spans: list[tuple[int, int]]) -> Tensor:
        """The image's latents one step on, guided if it has two rows; in float32."""
        parts = [velocity[start:end].float() for start, end in spans]
        guided = parts[0]
        if len(parts) == 2:
            conditional, unconditional = parts
            guided = unconditional + rendering.image.request.spec.guidance_scale * (conditional - unconditional)
        distance = rendering.sigmas[rendering.step + 1] - rendering.sigmas[rendering.step]
        return rendering.latents + distance.to(guided.device) * guided

    def _pack(self, renderings: list[Rendering]) -> PackedBatch:
        """The layout of these images; the last one is kept, since a set of images mostly goes on together."""
        last = self._batch
        if last is None or len(last.renderings) != len(renderings) or any(
            old is not new for old, new in zip(last.renderings, renderings, strict=True)
        ):  # fmt: skip
            self._batch = self._lay_out(renderings)
        assert self._batch is not None
        return self._batch

    def _lay_out(self, renderings: list[Rendering]) -> PackedBatch:
        size = padded(sum(r.tokens for r in renderings), self.block)
        device, head_dim = self.model.device, self.renderer.config.attention_head_dim
        modulation = torch.ones(size, dtype=torch.long)
        angles = torch.zeros(size, head_dim)
        lengths: list[int] = []
        spans: list[list[tuple[int, int]]] = []
        start = 0
        for number, rendering in enumerate(renderings):
            spans.append([])
            for glyphs in rendering.rows:
                patches = slice(start + len(glyphs), start + len(glyphs) + rendering.patches)
                modulation[start : patches.start] = 2 * number + 1
                modulation[patches] = 2 * number
                angles[patches] = rendering.angles
                spans[-1].append((patches.start, patches.stop))
                lengths.append(patches.stop - start)
                start = patches.stop
        cos, sin = elementwise(torch.cos, angles).to(device), elementwise(torch.sin, angles).to(device)
        return PackedBatch(list(renderings), RowLayout(lengths, modulation.to(device), cos, sin), spans, size)

    def _glyph_tokens(self, strings: tuple[str, ...]) -> Tensor:
        return self.renderer.glyphs(self.model.glyphs.encode(strings))

    def _rotary_angles(self, rows: int, cols: int) -> Tensor:
        return rotary_angles(rows, cols, self.renderer.config.attention_head_dim)
