import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import GlmImageProcessor

from models.errors import PromptError
from models.glm_image.config import CODE_CELL


class PromptEncoder:
    def __init__(self, processor: GlmImageProcessor):
        self.processor = processor
        self.image_token = int(processor.image_token_id)
        tokenizer = processor.tokenizer
        self._control_ids = frozenset(tokenizer.get_added_vocab().values()) | frozenset(tokenizer.all_special_ids)

    @classmethod
    def load(cls, folder: Path) -> "PromptEncoder":
        return cls(GlmImageProcessor.from_pretrained(folder))

    @property
    def settings(self) -> str:
        """Return what tokens depend on, as JSON."""
        tokenizer = self.processor.tokenizer
        parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, self.processor.chat_template]
        return json.dumps(parts, sort_keys=True)

    def count(self, text: str) -> int:
        """Return the tokens of a text without the chat template."""
        return len(self.processor.tokenizer(text, add_special_tokens=False).input_ids)

    def encode(self, prompt: str, height: int, width: int, num_sources: int = 0) -> list[int]:
        """Return token ids, the last of which starts an image of height x width pixels (multiples of 32). A source is
        one `image_token`.

        Raises:
            PromptError: it contains a control token.
        """
        tokenizer = self.processor.tokenizer
        control = self._control_ids.intersection(tokenizer(prompt, add_special_tokens=False).input_ids)
        if control:
            names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(control)))
            raise PromptError(f"the prompt contains control tokens of the model ({names}); remove them")
        if num_sources:
            return self._encode_edit(prompt, height, width, num_sources)
        inputs = self.processor.apply_chat_template(
            [[{"role": "user", "content": [{"type": "text", "text": prompt}]}]],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"target_h": height, "target_w": width},
        )
        return inputs["input_ids"][0].tolist()  # pyright: ignore

    def _encode_edit(self, prompt: str, height: int, width: int, num_sources: int) -> list[int]:
        """Encode as `GlmImageProcessor`, which would process the images again."""
        processor, tokenizer = self.processor, self.processor.tokenizer
        content = [{"type": "image"}] * num_sources + [{"type": "text", "text": prompt}]
        [text] = processor.apply_chat_template([[{"role": "user", "content": content}]], tokenize=False)
        text += f"{processor.grid_bos_token}{height // CODE_CELL} {width // CODE_CELL}{processor.grid_eos_token}"
        text += processor.bos_token
        return tokenizer(text, add_special_tokens=not text.startswith(processor.bos_token)).input_ids


def place_sources(ids: Sequence[int], image_token: int, grids: Sequence[tuple[int, int]]) -> tuple[list[int], Tensor]:
    """Repeat each source's image token once per code of its grid; return ids and positions [tokens, 3].

    Text advances all three.
    """
    assert list(ids).count(image_token) == len(grids), "the chat template has an image token for every source"
    tokens: list[int] = []
    positions: list[tuple[int, int, int]] = []
    remaining, start = list(grids), 0
    for token in ids:
        rows, cols = remaining.pop(0) if token == image_token else (1, 1)
        tokens += [token] * (rows * cols)
        positions += [(start, start + row, start + col) for row in range(rows) for col in range(cols)]
        start += max(rows, cols)
    return tokens, torch.tensor(positions)


def fill_in_codes(ids: Sequence[int], image_token: int, codes: Sequence[int]) -> list[int]:
    """Replace image tokens with the sources' codes."""
    remaining = iter(codes)
    return [next(remaining) if token == image_token else token for token in ids]
