"""Apart from the other fields: the command line need not import FastAPI."""

from typing import Literal

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
