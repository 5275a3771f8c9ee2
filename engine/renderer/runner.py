from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from engine.geometry import CELL, Geometry
from engine.jobs.job import TokenGrid
from engine.renderer.cuda_network import CudaNetwork
from engine.renderer.glyphs import GlyphCache
from engine.renderer.rendering import Rendering
from engine.renderer.source_kv import SourceKVCache
from engine.renderer.timesteps import initial_noise, partial_steps, schedule
from engine.request import Image, Request
from engine.streams import Streams
from models.batch_invariant import choose_tile_height, elementwise, padded
from models.errors import NonFiniteError
from models.glm_image.model import GlmImage
from models.glm_image.renderer import TEMB_TILE_HEIGHT, RendererBatch, patchify, rotary_angles, unpatchify

TILE_HEIGHT = 256  # on CPU
PREVIEW_STEPS = 4  # without guidance: a preview is early

Network = Callable[[Tensor, Tensor, RendererBatch], Tensor]
"""Predicts velocities as `Renderer.forward`; may overwrite its input."""


@dataclass(frozen=True)
class PackedRenderings:
    """A set of images and their batch, reused while the same."""

    renderings: list[Rendering]
    batch: RendererBatch
    patch_spans: list[list[tuple[int, int]]]  # (start, end) in the packed tensor, by image and branch
    size: int  # T


class RendererRunner:
    """Prepares images, advances sets of them, decodes the finished ones."""

    def __init__(self, model: GlmImage, streams: Streams):
        self.model, self.renderer, self._streams = model, model.renderer, streams
        self.tile_height = choose_tile_height(TILE_HEIGHT, model.device)
        self.temb_tile_height = choose_tile_height(TEMB_TILE_HEIGHT, model.device)
        self.source_kv = SourceKVCache(model, self.tile_height, self.temb_tile_height)
        self._cuda = CudaNetwork(model.renderer) if model.device.type == "cuda" else None
        self._network: Network = self._cuda.forward if self._cuda else model.renderer
        self.fallbacks = self._cuda.fallbacks if self._cuda else {}
        self._packed: PackedRenderings | None = None
        self.glyphs = GlyphCache(model)
        self._angles = lru_cache(maxsize=8)(self._rotary_angles)  # up to 8 MB each
        with torch.inference_mode():
            self._no_plan = self.renderer.no_plan()

    def warm_up(self) -> None:
        """Let a GPU's libraries choose their kernels, in the thread that launches ticks."""
        if self._cuda:
            self._cuda.warm_up()

    def prepare(self, image: Image) -> Rendering:
        """Compute what an image's steps share."""
        spec, plan = image.request.spec, image.plan
        assert plan is not None
        partial_after = partial_steps(spec.num_inference_steps, spec.partial_images - (image.preview is not None))
        grid = TokenGrid(plan.rows, plan.cols, plan.tokens)
        return self._prepare(
            image, grid, spec.geometry, spec.num_inference_steps, spec.guidance_scale > 1, partial_after
        )

    def prepare_preview(self, image: Image) -> Rendering:
        """Prepare the preview, on a canvas of its grid."""
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
        glyphs, *negative_glyphs = self.glyphs.of(image.request)
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
            negative_glyphs=negative_glyphs[0] if guided else None,
            time_embeddings=self.renderer.time_embeddings(
                timesteps.to(self.model.device), geometry.canvas_height, geometry.canvas_width
            ),
            sigmas=sigmas,
            angles=self._angles(geometry.patches.rows, geometry.patches.cols),
            source_kv=self.source_kv.of(image.request),
        )

    def encode_glyphs(self, request: Request) -> Generator[int]:
        """Compute glyph tokens for `prepare`, as `GlyphCache.compute`."""
        return self.glyphs.compute(request)

    def read_sources(self, request: Request) -> Generator[bool]:
        """Compute source keys and values for `prepare`, as `SourceKVCache.compute`."""
        return self.source_kv.compute(request)

    def release(self, request: Request) -> None:
        """Free what the request's images share, and a layout with them."""
        self.source_kv.release(request)
        self.glyphs.release(request)
        if self._packed is not None and any(r.request is request for r in self._packed.renderings):
            self._packed = None

    @torch.inference_mode()
    def advance(self, renderings: list[Rendering]) -> None:
        """Advance every image by one step. If it raises, no image has changed."""
        packed = self._pack(renderings)
        velocity = self._network(self._inputs(packed), self._time_embeddings(packed), packed.batch)
        guided = [self._guided(r, velocity, spans) for r, spans in zip(renderings, packed.patch_spans, strict=True)]
        stepped = [self._euler_step(r, velocity) for r, velocity in zip(renderings, guided, strict=True)]
        for rendering, latents, velocity in zip(renderings, stepped, guided, strict=True):
            rendering.latents, rendering.velocity = latents, velocity
            rendering.step += 1

    def padding(self, tokens: int) -> int:
        """Return the padding of packed tokens."""
        return padded(tokens, self.tile_height) - tokens

    @torch.inference_mode()
    def decode(self, rendering: Rendering) -> Callable[[], Tensor]:
        """Begin to decode; return what reads the pixels [height, width, 3] uint8, cropped to the requested size.

        Between steps decode the expected image: without the predicted noise.
        """
        geometry, sigma = rendering.geometry, rendering.sigmas[rendering.step]
        latents = rendering.latents
        if rendering.steps_left and rendering.velocity is not None:
            latents = latents - sigma * rendering.velocity  # a scalar of the CPU needs no copy
        left, top, right, bottom = geometry.crop_box
        latents = unpatchify(latents, geometry.patches.rows, geometry.patches.cols)
        decoded, is_finite = self.model.autoencoder.decode(latents)
        pixels = self._streams.copy_to_host(decoded[top:bottom, left:right].contiguous())
        was_finite = self._streams.copy_to_host(is_finite)

        def read() -> Tensor:
            if not was_finite:
                raise NonFiniteError("the decoded image is not finite")
            return pixels

        return read

    def _inputs(self, packed: PackedRenderings) -> Tensor:
        latents = torch.cat([r.latents for r in packed.renderings]).to(self.model.dtype)
        size = padded(latents.shape[0], self.tile_height)
        latents = torch.nn.functional.pad(latents, (0, 0, 0, size - latents.shape[0]))
        patches = self.renderer.patches(latents, self.tile_height)
        x = patches.new_zeros(packed.size, patches.shape[1])  # [T, dim]
        first = 0
        for rendering, spans in zip(packed.renderings, packed.patch_spans, strict=True):
            image_patches = patches[first : first + rendering.patches]
            plans = (rendering.plan, self._no_plan)
            for glyphs, plan, (start, end) in zip(rendering.branches, plans, spans, strict=False):
                x[start - len(glyphs) : start] = glyphs
                x[start:end] = image_patches + plan
            first += rendering.patches
        return x

    def _time_embeddings(self, packed: PackedRenderings) -> Tensor:
        temb = torch.stack([r.time_embeddings[r.step] for r in packed.renderings])
        return torch.nn.functional.pad(temb, (0, 0, 0, padded(len(temb), self.temb_tile_height) - len(temb)))

    def _guided(self, rendering: Rendering, velocity: Tensor, spans: list[tuple[int, int]]) -> Tensor:
        parts = [velocity[start:end].float() for start, end in spans]
        if len(parts) == 1:
            return parts[0]
        conditional, unconditional = parts
        return unconditional + rendering.request.spec.guidance_scale * (conditional - unconditional)

    def _euler_step(self, rendering: Rendering, velocity: Tensor) -> Tensor:
        distance = rendering.sigmas[rendering.step + 1] - rendering.sigmas[rendering.step]
        return rendering.latents + distance * velocity

    def _pack(self, renderings: list[Rendering]) -> PackedRenderings:
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
        source_kv: list[Tensor | None] = []
        spans: list[list[tuple[int, int]]] = []
        start = 0
        for index, rendering in enumerate(renderings):
            spans.append([])
            source_kv += [rendering.source_kv, None][: len(rendering.branches)]
            for glyphs in rendering.branches:
                patches = slice(start + len(glyphs), start + len(glyphs) + rendering.patches)
                modulation[start : patches.start] = 2 * index + 1
                modulation[patches] = 2 * index
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
            source_kv=source_kv,
        )
        return PackedRenderings(list(renderings), batch, spans, size)

    def _rotary_angles(self, rows: int, cols: int) -> Tensor:
        return rotary_angles(rows, cols, self.renderer.config.attention_head_dim)
