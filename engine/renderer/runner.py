"""Builds the renderer's tensors and runs it. What it runs is the scheduler's decision."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from engine.geometry import CELL, Geometry
from engine.jobs.job import TokenGrid
from engine.quotes import quoted_strings
from engine.renderer.rendering import Rendering
from engine.renderer.source_kv import SourceKVCache
from engine.renderer.timesteps import initial_noise, partial_steps, schedule
from engine.request import Image, Request
from models.batch_invariant import choose_tile_height, elementwise, padded
from models.glm_image.model import GlmImage
from models.glm_image.renderer import MODULATION_ROWS, RendererBatch, patchify, rotary_angles, unpatchify

ROWS = 256  # rows of a matrix product on CPU
PREVIEW_STEPS = 4  # without guidance: it is to be seen early, not finished


@dataclass(frozen=True)
class PackedRenderings:
    """A set of images and their batch, kept while the same set goes on.

    Args:
        patch_spans: for every image the (start, end) of the patches of each of its rows in the packed tensor.
        size: tokens of the packed tensor, padding included.
    """

    renderings: list[Rendering]
    batch: RendererBatch
    patch_spans: list[list[tuple[int, int]]]
    size: int


class RendererRunner:
    """Prepares images, advances sets of them by one step, and decodes the finished ones."""

    def __init__(self, model: GlmImage):
        self.model, self.renderer = model, model.renderer
        self.tile_height = choose_tile_height(ROWS, model.device)
        self.temb_tile_height = choose_tile_height(MODULATION_ROWS, model.device)
        self.source_kv = SourceKVCache(model, self.tile_height, self.temb_tile_height)
        self._packed: PackedRenderings | None = None
        self._angles = lru_cache(maxsize=64)(self._rotary_angles)
        self._glyphs = lru_cache(maxsize=64)(self._glyph_tokens)
        with torch.inference_mode():
            self._no_plan = self.renderer.no_plan()

    def prepare(self, image: Image) -> Rendering:
        """Everything about an image that its steps share. Its plan must be known."""
        spec, plan = image.request.spec, image.plan
        assert plan is not None
        partial_after = partial_steps(spec.num_inference_steps, spec.partial_images - (image.preview is not None))
        grid = TokenGrid(plan.rows, plan.cols, plan.tokens)
        return self._prepare(
            image, grid, spec.geometry, spec.num_inference_steps, spec.guidance_scale > 1, partial_after
        )

    def prepare_preview(self, image: Image) -> Rendering:
        """The same for the image's preview, on a canvas of the preview's grid."""
        grid = image.preview
        assert grid is not None
        geometry = Geometry(grid.cols * CELL, grid.rows * CELL)
        return self._prepare(image, grid, geometry, PREVIEW_STEPS, False, [PREVIEW_STEPS], is_preview=True)

    @torch.inference_mode()
    def _prepare(
        self,
        image: Image,
        grid: TokenGrid,
        geometry: Geometry,
        steps: int,
        guided: bool,
        partial_after: list[int],
        is_preview: bool = False,
    ) -> Rendering:
        spec = image.request.spec
        glyphs = self._glyphs(tuple(quoted_strings(spec.prompt)))
        negative_glyphs = self._glyphs(tuple(quoted_strings(spec.negative_prompt))) if guided else None
        codes = torch.tensor(grid.tokens, device=self.model.device).view(grid.rows, grid.cols)
        timesteps, sigmas = schedule(self.model.scheduler, geometry, steps)
        noise = initial_noise(image.seed, self.renderer.config.in_channels, geometry)
        return Rendering(
            image,
            geometry,
            grid,
            is_preview,
            partial_after,
            latents=patchify(noise, self.renderer.config.patch_size).to(self.model.device),
            plan=self.renderer.plan(codes),
            glyphs=glyphs,
            negative_glyphs=negative_glyphs,
            time_embeddings=self.renderer.time_embeddings(
                timesteps.to(self.model.device), geometry.canvas_height, geometry.canvas_width
            ),
            sigmas=sigmas,
            angles=self._angles(geometry.patches.rows, geometry.patches.cols),
            source_kv=self.source_kv.of(image.request),
        )

    def release(self, request: Request) -> None:
        """The request has ended: let go of what its images shared, and of a layout that still names them."""
        self.source_kv.release(request)
        if self._packed is not None and any(r.request is request for r in self._packed.renderings):
            self._packed = None

    @torch.inference_mode()
    def advance(self, renderings: list[Rendering]) -> None:
        """One denoising step of every image, each at its own timestep. If it raises, no image has changed."""
        packed = self._pack(renderings)
        velocity = self.renderer(self._inputs(packed), self._time_embeddings(packed), packed.batch)
        guided = [self._guided(r, velocity, spans) for r, spans in zip(renderings, packed.patch_spans, strict=True)]
        moved = [self._euler_step(r, own) for r, own in zip(renderings, guided, strict=True)]
        for rendering, latents, own in zip(renderings, moved, guided, strict=True):
            rendering.latents, rendering.velocity = latents, own
            rendering.step += 1

    def padding(self, tokens: int) -> int:
        """Rows computed for nothing when `tokens` are packed."""
        return padded(tokens, self.tile_height) - tokens

    @torch.inference_mode()
    def decode(self, rendering: Rendering) -> Tensor:
        """Pixels [height, width, 3], uint8, on the CPU, cropped to the size asked for.

        In the middle of its steps an image is decoded as it is expected to become: with the noise taken out that the
        last step saw in it.
        """
        geometry, sigma = rendering.geometry, rendering.sigmas[rendering.step]
        latents = rendering.latents
        if rendering.steps_left and rendering.velocity is not None:
            latents = latents - sigma.to(latents.device) * rendering.velocity
        left, top, right, bottom = geometry.crop_box
        decoded = self.model.autoencoder.decode(unpatchify(latents, geometry.patches.rows, geometry.patches.cols))
        return decoded[top:bottom, left:right].contiguous()

    def _inputs(self, packed: PackedRenderings) -> Tensor:
        """[T, dim]: every row's glyph tokens, then its patches with the plan (or none) added."""
        latents = torch.cat([r.latents for r in packed.renderings]).to(self.model.dtype)
        rows = padded(latents.shape[0], self.tile_height)
        latents = torch.nn.functional.pad(latents, (0, 0, 0, rows - latents.shape[0]))
        patches = self.renderer.patches(latents, self.tile_height)
        x = patches.new_zeros(packed.size, patches.shape[1])
        first = 0
        for rendering, spans in zip(packed.renderings, packed.patch_spans, strict=True):
            own = patches[first : first + rendering.patches]
            plans = (rendering.plan, self._no_plan)
            for glyphs, plan, (start, end) in zip(rendering.branches, plans, spans, strict=False):
                x[start - len(glyphs) : start] = glyphs
                x[start:end] = own + plan
            first += rendering.patches
        return x

    def _time_embeddings(self, packed: PackedRenderings) -> Tensor:
        rows = torch.stack([r.time_embeddings[r.step] for r in packed.renderings])
        return torch.nn.functional.pad(rows, (0, 0, 0, padded(len(rows), self.temb_tile_height) - len(rows)))

    def _guided(self, rendering: Rendering, velocity: Tensor, spans: list[tuple[int, int]]) -> Tensor:
        """[patches, P] float32: the image's own velocity, guided if it has two rows."""
        parts = [velocity[start:end].float() for start, end in spans]
        if len(parts) == 1:
            return parts[0]
        conditional, unconditional = parts
        return unconditional + rendering.request.spec.guidance_scale * (conditional - unconditional)

    def _euler_step(self, rendering: Rendering, velocity: Tensor) -> Tensor:
        """The image's latents one step on; in float32."""
        distance = rendering.sigmas[rendering.step + 1] - rendering.sigmas[rendering.step]
        return rendering.latents + distance.to(velocity.device) * velocity

    def _pack(self, renderings: list[Rendering]) -> PackedRenderings:
        """Lay the images out; the last layout is kept, since a set of images mostly goes on together."""
        last = self._packed
        if last is None or len(last.renderings) != len(renderings) or any(
            old is not new for old, new in zip(last.renderings, renderings, strict=True)
        ):  # fmt: skip
            self._packed = self._lay_out(renderings)
        assert self._packed is not None
        return self._packed

    def _lay_out(self, renderings: list[Rendering]) -> PackedRenderings:
        size = padded(sum(r.tokens for r in renderings), self.tile_height)
        device, head_dim = self.model.device, self.renderer.config.attention_head_dim
        modulation = torch.ones(size, dtype=torch.long)
        angles = torch.zeros(size, head_dim)
        lengths: list[int] = []
        sources: list[Tensor | None] = []
        spans: list[list[tuple[int, int]]] = []
        start = 0
        for number, rendering in enumerate(renderings):
            spans.append([])
            sources += [rendering.source_kv, None][: len(rendering.branches)]
            for glyphs in rendering.branches:
                patches = slice(start + len(glyphs), start + len(glyphs) + rendering.patches)
                modulation[start : patches.start] = 2 * number + 1
                modulation[patches] = 2 * number
                angles[patches] = rendering.angles
                spans[-1].append((patches.start, patches.stop))
                lengths.append(patches.stop - start)
                start = patches.stop
        cos, sin = elementwise(torch.cos, angles).to(device), elementwise(torch.sin, angles).to(device)
        batch = RendererBatch(
            lengths,
            modulation.to(device),
            cos,
            sin,
            tile_height=self.tile_height,
            temb_tile_height=self.temb_tile_height,
            source_kv=sources,
        )
        return PackedRenderings(list(renderings), batch, spans, size)

    def _glyph_tokens(self, strings: tuple[str, ...]) -> Tensor:
        return self.renderer.glyphs(self.model.glyphs.encode(strings))

    def _rotary_angles(self, rows: int, cols: int) -> Tensor:
        return rotary_angles(rows, cols, self.renderer.config.attention_head_dim)
