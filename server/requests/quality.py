"""The values of `quality`. Apart from the other fields, so that the command line need not import FastAPI."""

from typing import Literal

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
