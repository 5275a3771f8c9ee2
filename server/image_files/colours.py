"""Converting decoded images to sRGB."""

import io

from PIL import Image as PillowImage
from PIL import ImageCms
from PIL.Image import Image


def to_srgb(image: Image, profile: bytes) -> Image:
    """Convert RGB, RGBA or CMYK to RGB or RGBA in sRGB; alpha stays. A profile that is not valid is ignored."""
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if profile[16:20] == b"GRAY":
            return _grey_to_srgb(image, source)
        return _apply(image, source, image.mode, mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image if image.mode == mode else image.convert(mode)


def _grey_to_srgb(image: Image, source: ImageCms.ImageCmsProfile) -> Image:
    """Convert by a table: littlecms' own for grey is off by up to 10 in dark parts of linear images."""
    ramp = PillowImage.frombytes("L", (256, 1), bytes(range(256)))
    table = _apply(ramp, source, "L", "RGB", ImageCms.Flags.NOOPTIMIZE).getchannel(0).tobytes()
    grey = image.getchannel(0).point(list(table))
    return PillowImage.merge(image.mode, [grey, grey, grey, *image.split()[3:]])


def _apply(
    image: Image,
    source: ImageCms.ImageCmsProfile,
    mode: str,
    output_mode: str,
    flags: ImageCms.Flags = ImageCms.Flags.NONE,
) -> Image:
    srgb = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(source, srgb, mode, output_mode, ImageCms.Intent.PERCEPTUAL, flags)
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # as it is not in place
    return converted
