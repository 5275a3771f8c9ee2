from collections import OrderedDict
from collections.abc import Generator

import torch
from torch import Tensor

from engine.quotes import quoted_strings
from engine.request import Request
from models.glm_image.model import GlmImage

MAX_CACHED_TOKENS = 16384  # 128 MB of the published model's


class GlyphCache:
    """Holds projected glyph tokens [g, dim] of running requests, and the last used."""

    def __init__(self, model: GlmImage):
        self._model = model
        self._by_request: dict[Request, list[Tensor]] = {}
        self._by_strings: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()

    def of(self, request: Request) -> list[Tensor]:
        """Return the tokens of all branches, conditional first; computed on first use."""
        for _ in self.compute(request):
            pass
        return self._by_request[request]

    def compute(self, request: Request) -> Generator[int]:
        """Compute a request's tokens; yield the encoder's after every batch."""
        if request in self._by_request:
            return
        spec = request.spec
        branches = []
        for text in [spec.prompt, spec.negative_prompt] if spec.guidance_scale > 1 else [spec.prompt]:
            branches.append((yield from self._tokens(tuple(quoted_strings(text, spec.quotes)))))
        self._by_request[request] = branches

    def release(self, request: Request) -> None:
        """Drop a request."""
        self._by_request.pop(request, None)

    @torch.inference_mode()
    def _tokens(self, strings: tuple[str, ...]) -> Generator[int, None, Tensor]:
        if strings not in self._by_strings:
            embeddings = yield from self._model.glyphs.encode_by_batch(strings)
            self._by_strings[strings] = self._model.renderer.glyphs(embeddings)
        self._by_strings.move_to_end(strings)
        tokens = self._by_strings[strings]
        while sum(map(len, self._by_strings.values())) > MAX_CACHED_TOKENS:
            self._by_strings.popitem(last=False)
        return tokens
