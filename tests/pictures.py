"""Pictures to edit."""

import io

import numpy as np
from PIL import Image

from engine.jobs.job import SourceImages


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Soft blobs of colour, as unlike from cell to cell as a random checkpoint needs them to be."""
    blobs = np.random.RandomState(seed).randint(0, 255, (max(2, height // 16), max(2, width // 16), 3))
    return Image.fromarray(blobs.astype("uint8")).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def sources(*images: Image.Image, overlay: Image.Image | None = None) -> SourceImages:
    return SourceImages([png(image) for image in images], png(overlay) if overlay else None)
