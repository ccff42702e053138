"""Opening images: a folder, a list of files, or a dataset of the hub."""

import io
import struct
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def find_images(path: str | Path) -> list[Path]:
    """Image files below a folder, or named by a text file with one path a line, sorted.

    Raises:
        ValueError: there are none.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS)
    else:
        files = [Path(line) for line in path.read_text().splitlines() if line.strip()]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{path} names {len(missing)} files that do not exist, first {missing[0]}.")
    if not files:
        raise ValueError(f"No images in {path}: looked for {', '.join(sorted(EXTENSIONS))}, also in its subfolders.")
    return files


def dataset_of_files(files: list[Path]) -> datasets.Dataset:
    """A dataset with one column `image`, encoded bytes read when an item is."""
    dataset = datasets.Dataset.from_dict({"image": [str(file) for file in files]})
    return dataset.cast_column("image", datasets.Image(decode=False))


def load_images(
    name_or_path: str,
    split: str = "train",
    config_name: str | None = None,
    image_column: str = "image",
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """A dataset whose column `image` holds encoded images for `decode_image`.

    Args:
        name_or_path: a folder of images, a `.txt` file that lists images, or a dataset of the hub.
        split, config_name: of a hub dataset.
        image_column: the column of a hub dataset that holds the images.
        streaming: read a hub dataset as it is used, without downloading it first.

    Raises:
        ValueError: no images, or no such column.
    """
    if Path(name_or_path).is_dir() or (name_or_path.endswith(".txt") and Path(name_or_path).is_file()):
        return dataset_of_files(find_images(name_or_path))
    if not streaming:
        print(f"Loading dataset {name_or_path}, split {split}: the first time, it is downloaded.", flush=True)
    dataset = datasets.load_dataset(name_or_path, config_name, split=split, streaming=streaming)
    if dataset.column_names and image_column not in dataset.column_names:
        raise ValueError(f"{name_or_path} has no column '{image_column}', only {dataset.column_names}.")
    dataset = dataset.select_columns([image_column])
    if image_column != "image":
        dataset = dataset.rename_column(image_column, "image")
    return dataset.cast_column("image", datasets.Image(decode=False))


def decode_image(record: dict) -> Image.Image:
    """PIL image of a `datasets.Image(decode=False)` record, turned as its EXIF says if that can be read; 16-bit grey
    levels become 8-bit ones.

    Raises:
        ValueError: the file is not an image, or is damaged; named.
    """
    try:
        source = record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"])
        with Image.open(source) as image:
            image.load()
            try:
                image = ImageOps.exif_transpose(image)
            except (OSError, SyntaxError, TypeError, ValueError, struct.error):  # broken EXIF is no broken image
                pass
            if image.mode.startswith("I;16") or image.mode == "I":  # PIL would clip at 255
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return image
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read the image {record['path']}: {error} Remove or replace it.") from error
