"""Embedding tables that are sums of factors.

Codes with the factor "red" share a vector with the word "red": what one learns holds for all. The checkpoint gets the
sums.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from models.nano.recipe import codes, phrases
from models.nano.recipe.tokenizer import in_bytes, strings


class FactoredTable(nn.Module):
    """Table [rows, dim]: the sum of a vector per factor and one of the row (`own`)."""

    def __init__(self, factors: Tensor, dim: int, std: float, own_std: float):
        super().__init__()
        self.factors: Tensor
        self.indicators: Tensor
        self.register_buffer("factors", factors)  # [rows, factors] int64, 0 is none
        self.register_buffer("indicators", _indicators(factors), persistent=False)
        self.parts = nn.ParameterList([torch.randn(n, dim) * std for n in codes.FACTORS.values()])
        self.own = nn.Parameter(torch.randn(len(factors), dim) * own_std)

    def forward(self) -> Tensor:
        with torch.autocast(
            self.own.device.type, enabled=False
        ):  # products with 0 and 1, several times as fast as rows
            return self.own + self.indicators @ torch.cat(list(self.parts))


def _indicators(factors: Tensor) -> Tensor:
    """Return [rows, values of all factors] with 1 where a row has a value, but for 0, which is none."""
    columns = []
    for column, size in enumerate(codes.FACTORS.values()):
        one_hot = F.one_hot(factors[:, column], size).float()
        one_hot[:, 0] = 0
        columns.append(one_hot)
    return torch.cat(columns, 1)


def code_factors(rows: int = codes.CODEBOOK) -> Tensor:
    """Return factors [rows, factors] of codes, 0 past them."""
    table = torch.zeros(rows, len(codes.FACTORS), dtype=torch.long)
    table[: codes.CODEBOOK] = torch.tensor([codes.factors(code) for code in range(codes.CODEBOOK)])
    return table


def vocabulary_factors(tokenizer: PreTrainedTokenizerFast, rows: int) -> Tensor:
    """Return factors [rows, factors] of codes, words, strings."""
    table, columns = code_factors(rows), list(codes.FACTORS)

    def mark(word: str, factor: str, value: int) -> None:
        token = tokenizer.convert_tokens_to_ids(word)
        if token is not None:
            table[token, columns.index(factor)] = value

    for i, colour in enumerate(codes.COLOURS):
        for word in (colour, *(w for w, means in phrases.COLOUR_WORDS.items() if means == colour)):
            mark(word, "colour", 1 + i)
    for i, shape in enumerate(codes.SHAPES):
        for word in (shape, *(w for w, means in phrases.SHAPE_WORDS.items() if means == shape)):
            mark(word, "shape", 1 + i)
    for name, (length, initial) in strings().items():
        mark(in_bytes(name), "initial", initial)
        mark(in_bytes(name), "length", length)
    return table
