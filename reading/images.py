"""Opening images: how a file or bytes become a picture."""

import os
import zlib

import fsspec
from PIL import Image

from image_processing_simvq import FORMATS, read_image


try:
    from pillow_heif import register_heif_opener
except ImportError:  # Pillow alone cannot read the photographs of iPhones
    pass
else:
    register_heif_opener()

# of files that are looked at in a folder: all that Pillow, as it was built, has registered for the formats we allow
EXTENSIONS = {extension for extension, name in Image.registered_extensions().items() if name in FORMATS}
BELOW = "/./"  # in the path of a record: its name begins behind it, as rsync has it


def image_name(record: dict) -> str:
    """What a `datasets.Image(decode=False)` record is called: for a file of a folder, its path below the folder,
    wherever that is; else its path as written. In datasets of the hub, files of the same name in different folders may
    have the same path, which comes with bytes: a checksum of these belongs to the name."""
    name = (record["path"] or "").rpartition(BELOW)[2]
    return name if record["bytes"] is None else f"{name} {zlib.crc32(record['bytes']):08x}"


def shown_path(record: dict | None) -> str:
    """Where the image of a record is, for people; "" if it has none. The paths of bytes need not be different: they get
    a checksum."""
    path, data = ((record or {}).get(name) for name in ("path", "bytes"))
    path = (path or "").replace(BELOW, "/")
    return path if data is None else f"{path or 'an image without a path'} (checksum {zlib.crc32(data):08x})"


def decode_image(record: dict | None, turned_by_exif: bool = True, transparency: str = "white") -> Image.Image:
    """PIL image in 8-bit RGB of a `datasets.Image(decode=False)` record, see `to_rgb` in `image_processing_simvq`.

    Args:
        record: with `bytes`, or the `path` of a file: local, or as fsspec writes it (`zip://a.jpg::/x.zip`,
            `hf://datasets/...`).
        turned_by_exif: `False` leaves it as it lies in the file.
        transparency: "white", composited on it; or "dropped".

    Raises:
        ValueError: there is no image, it cannot be opened, or it is damaged; named.
    """
    path, data = ((record or {}).get(name) for name in ("path", "bytes"))
    if data is None and path is None:
        raise ValueError("Cannot read an image: the record has neither bytes nor a path.")
    if data is None and "://" in path and not os.path.isfile(path):
        try:
            with fsspec.open(path, "rb") as file:
                data = file.read()
        except Exception as error:  # each of fsspec's file systems has exceptions of its own
            raise ValueError(f"Cannot open the image {shown_path(record)}: {type(error).__name__}: {error}") from error
    return read_image(path if data is None else data, shown_path(record), transparency, turned_by_exif)
