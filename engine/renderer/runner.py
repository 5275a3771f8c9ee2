from collections.abc import Callable, Generator
from functools import lru_cache

import torch
from torch import Tensor

from engine.geometry import CELL, Geometry
from engine.jobs.job import TokenGrid
from engine.observability.fallbacks import log_fallbacks
from engine.renderer.allocator import keep_freed_memory
from engine.renderer.cuda_network import CudaNetwork
from engine.renderer.glyphs import GlyphCache
from engine.renderer.modulations import ModulationCache
from engine.renderer.packing import PackedRenderings, lay_out
from engine.renderer.rendering import Rendering
from engine.renderer.source_kv import SourceKVCache
from engine.renderer.timesteps import initial_noise, partial_steps, schedule
from engine.request import Image, Request
from engine.streams import Streams
from models.batch_invariant import choose_tile_height, padded
from models.device_copies import upload
from models.errors import NonFiniteError
from models.glm_image.cpu_renderer import CpuRenderer, choose_cpu_renderer
from models.glm_image.model import GlmImage
from models.glm_image.renderer import RendererBatch, patchify, rotary_angles, unpatchify
from models.threads import threads

TILE_HEIGHT = 256  # on CPU
PREVIEW_STEPS = 4  # without guidance: a preview is early

Network = Callable[[Tensor, Tensor, RendererBatch], Tensor]
"""Predicts velocities as `Renderer.forward`; may overwrite its input."""


class RendererRunner:
    """Prepares images, advances sets of them, decodes the finished ones."""

    def __init__(self, model: GlmImage, streams: Streams):
        self.model, self.renderer, self._streams = model, model.renderer, streams
        self.tile_height = choose_tile_height(TILE_HEIGHT, model.device)
        self.source_kv = SourceKVCache(model, self.tile_height)
        self.modulations = ModulationCache(model.renderer)
        self._cuda = CudaNetwork(model.renderer) if model.device.type == "cuda" else None
        self._network, self.fallbacks, self._row_multiple = self._choose_network()
        self._threads = 1 if isinstance(self._network, CpuRenderer) else None  # it has threads of its own
        self._packed: PackedRenderings | None = None
        self.glyphs = GlyphCache(model)
        self._angles = lru_cache(maxsize=8)(self._rotary_angles)  # up to 8 MB each
        with torch.inference_mode():
            self._no_plan = self.renderer.no_plan()

    def _choose_network(self) -> tuple[Network, dict[str, str], int | None]:
        """Return what runs ticks, what torch does instead of it, and what T is a multiple of."""
        if self._cuda:
            return self._cuda.forward, self._cuda.fallbacks, None
        keep_freed_memory()
        cpu, failures = choose_cpu_renderer(self.renderer)
        log_fallbacks(failures)
        return (cpu, failures, None) if cpu else (self.renderer, failures, self.tile_height)

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
        codes = upload(torch.tensor(grid.tokens), self.model.device).view(grid.rows, grid.cols)
        timesteps, sigmas = schedule(self.model.scheduler, geometry, steps)
        noise = initial_noise(image.seed, self.renderer.config.in_channels, geometry)
        return Rendering(
            image,
            geometry,
            grid,
            is_preview,
            partial_after,
            latents=upload(patchify(noise, self.renderer.config.patch_size), self.model.device),
            plan=self.renderer.plan(codes),
            glyphs=glyphs,
            negative_glyphs=negative_glyphs[0] if guided else None,
            time_embeddings=self.renderer.time_embeddings(
                upload(timesteps, self.model.device), geometry.canvas_height, geometry.canvas_width
            ),
            sigmas=sigmas,
            distances=upload(sigmas.diff(), self.model.device),
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

    def advance(self, renderings: list[Rendering]) -> None:
        """Advance every image by one step. If it raises, no image has changed."""
        with threads(self._threads), torch.inference_mode():
            self._advance(renderings)

    def _advance(self, renderings: list[Rendering]) -> None:
        packed = self._pack(renderings)
        latents = torch.cat([r.latents for r in renderings])
        velocity = self._network(self._inputs(packed, latents), self.modulations.of_step(renderings), packed.batch)
        guided = self._guided(packed, velocity)
        distance = torch.stack([r.distances[r.step] for r in renderings])[packed.owner]
        stepped = latents.add_(distance[:, None] * guided)
        counts = [r.patches for r in renderings]
        for rendering, own, velocity in zip(renderings, stepped.split(counts), guided.split(counts), strict=True):
            rendering.latents, rendering.velocity = own, velocity
            rendering.step += 1

    def padding(self, tokens: int) -> int:
        """Return the padding of packed tokens."""
        return padded(tokens, self._row_multiple) - tokens

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

    def _inputs(self, packed: PackedRenderings, latents: Tensor) -> Tensor:
        rows = padded(len(latents), self.tile_height)
        padded_latents = torch.nn.functional.pad(latents.to(self.model.dtype), (0, 0, 0, rows - len(latents)))
        patches = self.renderer.patches(padded_latents, self.tile_height)
        x = packed.base.clone()
        by_image = patches[: len(latents)].split([r.patches for r in packed.renderings])
        for branch in packed.branches:
            x[branch.patches].add_(by_image[branch.image])
        return x

    def _guided(self, packed: PackedRenderings, velocity: Tensor) -> Tensor:
        """Return the velocity under guidance [patches, P] float32: the conditional one without guidance."""
        conditional = velocity.index_select(0, packed.conditional).float()
        if packed.unconditional is None:
            return conditional
        unconditional = velocity.index_select(0, packed.unconditional).float()
        return conditional.sub_(unconditional).mul_(packed.guidance).add_(unconditional)

    def _pack(self, renderings: list[Rendering]) -> PackedRenderings:
        last = self._packed
        if last is None or len(last.renderings) != len(renderings) or any(
            old is not new for old, new in zip(last.renderings, renderings, strict=True)
        ):  # fmt: skip
            self._packed = lay_out(renderings, self._no_plan, self._row_multiple)
        assert self._packed is not None
        return self._packed

    def _rotary_angles(self, rows: int, cols: int) -> Tensor:
        return rotary_angles(rows, cols, self.renderer.config.attention_head_dim)
