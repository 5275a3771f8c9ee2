"""Prompts: the planner's token ids, and the quoted strings that the glyph encoder spells out."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import ByT5Tokenizer, GlmImageProcessor, T5EncoderModel

from models.errors import PromptError

# The order matters: the strings are concatenated in it.
QUOTES = (r"'([^']*)'", r"\u201c([^\u201c\u201d]*)\u201d", r'"([^"]*)"', r"\u300c([^\u300c\u300d]*)\u300d")
MAX_GLYPH_TOKENS_PER_STRING = 2048
MAX_GLYPH_TOKENS = 8192


class PromptEncoder:
    """Chat template and tokenizer of the planner."""

    def __init__(self, processor: GlmImageProcessor):
        self.processor = processor
        tokenizer = processor.tokenizer
        self._control_ids = frozenset(tokenizer.get_added_vocab().values()) | frozenset(tokenizer.all_special_ids)

    @classmethod
    def load(cls, folder: Path) -> "PromptEncoder":
        return cls(GlmImageProcessor.from_pretrained(folder))

    def encode(self, prompt: str, height: int, width: int) -> list[int]:
        """Token ids for an image of height x width pixels (multiples of 32); the last is the one that starts an image.

        Raises:
            PromptError: the prompt spells out a control token of the model, such as `<|image|>`.
        """
        tokenizer = self.processor.tokenizer
        control = self._control_ids.intersection(tokenizer(prompt, add_special_tokens=False).input_ids)
        if control:
            names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(control)))
            raise PromptError(f"the prompt holds control tokens of the model ({names}); take them out")
        inputs = self.processor.apply_chat_template(
            [[{"role": "user", "content": [{"type": "text", "text": prompt}]}]],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"target_h": height, "target_w": width},
        )
        return inputs["input_ids"][0].tolist()  # pyright: ignore


def quoted_strings(prompt: str) -> list[str]:
    """The texts to be lettered: all single-quoted strings, then curly, double and corner-bracketed ones."""
    return [text for pattern in QUOTES for text in re.findall(pattern, prompt)]


class GlyphEncoder:
    """ByT5 and a T5 encoder: what the renderer knows of the letters."""

    def __init__(self, tokenizer: ByT5Tokenizer, encoder: T5EncoderModel):
        self.tokenizer, self.encoder = tokenizer, encoder

    @torch.inference_mode()
    def encode(self, strings: Sequence[str]) -> Tensor:
        """[g, d_model] embeddings of all strings, one after the other; of "" if there are none.

        Raises:
            PromptError: more text than the renderer should be asked to letter.
        """
        ids = self.tokenizer(list(strings) or [""], max_length=MAX_GLYPH_TOKENS_PER_STRING, truncation=True).input_ids
        total = sum(len(i) for i in ids)
        if total > MAX_GLYPH_TOKENS:
            raise PromptError(f"the quoted strings have {total} bytes; at most {MAX_GLYPH_TOKENS} can be lettered")
        pad = self.tokenizer.pad_token_id
        # As the model was trained: one pad in front of every string where their number is even.
        ids = [[pad] * ((len(ids) + 1) % 2) + i for i in ids]
        longest = max(len(i) for i in ids)
        device = self.encoder.device
        tokens = torch.tensor([i + [pad] * (longest - len(i)) for i in ids], device=device)
        mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids], device=device)
        return self.encoder(tokens, attention_mask=mask).last_hidden_state[mask.bool()]
