"""Glyph embeddings of quoted strings, for the renderer."""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor
from transformers import ByT5Tokenizer, T5EncoderModel

from models.errors import PromptError

# Also in engine/quotes.py, for the API; a test compares them.
MAX_GLYPH_TOKENS_PER_STRING = 2048  # the reference cuts longer strings, too
MAX_GLYPH_TOKENS = 8192

BATCH_TOKENS = 2048  # with padding; attention takes at most their square


class GlyphEncoder:
    def __init__(self, tokenizer: ByT5Tokenizer, encoder: T5EncoderModel):
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        assert isinstance(pad, int)
        assert isinstance(end, int)
        self.encoder = encoder
        self._offset, self._pad, self._end = tokenizer.offset, pad, end

    def encode(self, strings: Sequence[str]) -> Tensor:
        """Return embeddings [g, d_model] of all strings, or of "".

        Raises:
            PromptError: more than `MAX_GLYPH_TOKENS`.
        """
        batches = self.encode_by_batch(strings)
        while True:
            try:
                next(batches)
            except StopIteration as end:
                return end.value

    @torch.inference_mode()
    def encode_by_batch(self, strings: Sequence[str]) -> Generator[int, None, Tensor]:
        """Encode as `encode`; yield the padded tokens of each batch."""
        ids = self._ids(strings)
        total = sum(map(len, ids))
        if total > MAX_GLYPH_TOKENS:
            raise PromptError(f"the quoted strings have {total} bytes; at most {MAX_GLYPH_TOKENS} can be rendered")
        distinct = list(dict.fromkeys(ids))
        embeddings: dict[tuple[int, ...], Tensor] = {}
        for batch in batches([len(i) for i in distinct]):
            chosen = [distinct[index] for index in batch]
            embeddings |= zip(chosen, self._encode_batch(chosen), strict=True)
            yield len(chosen) * max(map(len, chosen))
        return torch.cat([embeddings[i] for i in ids])

    def _ids(self, strings: Sequence[str]) -> list[tuple[int, ...]]:
        """Return ByT5 tokens, none for control: `</s>` in a string is text to draw."""
        strings = strings or [""]
        # As in training, for an even number.
        front = [self._pad] * ((len(strings) + 1) % 2)
        texts = [text.encode()[: MAX_GLYPH_TOKENS_PER_STRING - 1] for text in strings]
        return [(*front, *(byte + self._offset for byte in text), self._end) for text in texts]

    def _encode_batch(self, ids: list[tuple[int, ...]]) -> Sequence[Tensor]:
        lengths, device = [len(i) for i in ids], self.encoder.device
        longest = max(lengths)
        tokens = torch.tensor([[*i, *[self._pad] * (longest - len(i))] for i in ids], device=device)
        mask = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths], device=device)
        return self.encoder(tokens, attention_mask=mask).last_hidden_state[mask.bool()].split(lengths)


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Divide strings into batches of at most `BATCH_TOKENS` with padding, by index.

    If they do not fit into one, similar lengths together: less than half of a batch is padding.
    """
    divided: list[list[int]] = []
    longest = max(lengths)
    fits_in_one = len(lengths) * longest <= BATCH_TOKENS
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        similar = fits_in_one or 2 * lengths[index] > longest
        if divided and similar and (len(divided[-1]) + 1) * longest <= BATCH_TOKENS:
            divided[-1].append(index)
        else:
            longest = lengths[index]
            divided.append([index])
    return [sorted(batch) for batch in divided]
