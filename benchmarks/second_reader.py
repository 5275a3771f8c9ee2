"""Words read by tesseract (Debian: tesseract-ocr), which knows nothing of the drawing code but where lines may be."""

import shutil
import subprocess
from io import BytesIO

import numpy as np
from PIL import Image

from models.nano.recipe import world
from models.nano.recipe.world import CELL, Line, Poster

HEIGHT = 96  # pixels of a band given to tesseract
MARGIN = 24
COMMAND = ("tesseract", "-", "-", "--psm", "7", "-l", "eng", "-c", "load_system_dawg=0", "-c", "load_freq_dawg=0",
           "-c", f"tessedit_char_whitelist={world.ALPHABET.replace(' ', '')}")  # fmt: skip


def is_installed() -> bool:
    return shutil.which("tesseract") is not None


def read_words(image: np.ndarray, found: Poster) -> set[str]:
    """Return the text, without spaces, of each band in which a line can be beside the shapes in `found`."""
    rows, columns = image.shape[0] // CELL, image.shape[1] // CELL
    between = ("subtitle", "middle") if not found.shapes else ("subtitle",) if found.subtitle else ()
    bands = Poster(0).with_lines({zone: Line("X") for zone in world.ZONES if zone in ("headline", "footer", *between)})
    return {_read(image[p.row * CELL : (p.row + p.rows) * CELL]) for p in world.place(bands, rows, columns)[0]}


def _read(band: np.ndarray) -> str:
    edge = np.median(band[:3].reshape(-1, 3), 0)
    distance = np.linalg.norm(band.astype(np.float32) - edge, axis=-1)
    if distance.max() < 60:
        return ""
    gray = Image.fromarray((255 - np.clip(distance / distance.max(), 0, 1) * 255).astype(np.uint8))
    width = round(band.shape[1] * HEIGHT / band.shape[0])
    page = Image.new("L", (width + 2 * MARGIN, HEIGHT + 2 * MARGIN), 255)
    page.paste(gray.resize((width, HEIGHT), Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    file = BytesIO()
    page.save(file, "PNG", dpi=(300, 300))
    made = subprocess.run(COMMAND, input=file.getvalue(), capture_output=True, check=True)
    return "".join(made.stdout.decode().split()).upper()
