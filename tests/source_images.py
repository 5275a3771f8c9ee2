"""Source images of edits."""

import io

import numpy as np
from PIL import Image

from engine.jobs.job import SourceImages


def source_image(seed: int, width: int, height: int) -> Image.Image:
    """Return soft blobs of colour that differ from cell to cell as much as a random checkpoint needs."""
    blobs = np.random.RandomState(seed).randint(0, 255, (max(2, height // 16), max(2, width // 16), 3))
    return Image.fromarray(blobs.astype("uint8")).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    """Return the image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def source_images(*images: Image.Image, overlay: Image.Image | None = None) -> SourceImages:
    """Return what an edit of these images sends."""
    return SourceImages([png(image) for image in images], png(overlay) if overlay else None)
