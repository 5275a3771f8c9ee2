"""Shifts, scales and gates of denoising steps, which depend on the schedule and the size alone."""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from engine.renderer.rendering import Rendering
from models.glm_image.renderer import Renderer, stack_modulations

CHUNK = 16  # steps that are computed at once: a product's bits depend on its rows
MAX_BYTES = 512 << 20  # 10 chunks of the published model, which needs 4 for 50 steps

Key = tuple[int, int, int, int]  # steps, canvas height and width, chunk


class ModulationCache:
    """Holds modulations [CHUNK, M, 2, dim], shared by images of equal steps and size; the last used.

    One chunk that is more than `max_bytes` is kept, too.
    """

    def __init__(self, renderer: Renderer, max_bytes: int = MAX_BYTES):
        self._renderer, self._max_bytes = renderer, max_bytes
        self._chunks: OrderedDict[Key, Tensor] = OrderedDict()

    @property
    def bytes(self) -> int:
        return sum(chunk.nbytes for chunk in self._chunks.values())

    def of_step(self, renderings: Sequence[Rendering]) -> Tensor:
        """Return the modulations of the images' current steps [M, 2n, dim]."""
        return stack_modulations([self._chunk(r)[r.step % CHUNK] for r in renderings])

    def _chunk(self, rendering: Rendering) -> Tensor:
        geometry, number = rendering.geometry, rendering.step // CHUNK
        key = rendering.steps, geometry.canvas_height, geometry.canvas_width, number
        if key not in self._chunks:
            temb = rendering.time_embeddings[number * CHUNK : (number + 1) * CHUNK]
            self._chunks[key] = padded_modulations(self._renderer, temb)
            while self.bytes > self._max_bytes and len(self._chunks) > 1:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(key)
        return self._chunks[key]


def padded_modulations(renderer: Renderer, temb: Tensor) -> Tensor:
    """Return the modulations [CHUNK, M, 2, dim] of up to `CHUNK` time embeddings [rows, E]."""
    return renderer.modulations(F.pad(temb, (0, 0, 0, CHUNK - len(temb))))
