"""Opening images: how a file or bytes become a picture."""

import io
import struct

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


Image.init()
# not all that Pillow knows: for some it starts other programs (Ghostscript for EPS)
FORMATS = {"AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
FORMATS = sorted(FORMATS & Image.OPEN.keys())
EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def decode_image(record: dict, turned_by_exif: bool = True) -> Image.Image:
    """PIL image of a `datasets.Image(decode=False)` record, turned as its EXIF says if that can be read; 16-bit grey
    levels become 8-bit ones.

    Args:
        record: with `bytes`, or the `path` of a file.
        turned_by_exif: `False` leaves it as it lies in the file.

    Raises:
        ValueError: the file is not an image, or is damaged; named.
    """
    try:
        source = record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"])
        with Image.open(source, formats=FORMATS) as image:
            image.load()
            try:
                image = ImageOps.exif_transpose(image) if turned_by_exif else image
            except (OSError, SyntaxError, TypeError, ValueError, struct.error):  # broken EXIF is no broken image
                pass
            if image.mode.startswith("I;16") or image.mode == "I":  # PIL would clip at 255
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return image
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read the image {record['path']}: {error} Remove or replace it.") from error
