"""Opening images: a folder, a list of files, or a dataset of the hub."""

import io
import struct
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError


Image.init()
# not all that Pillow knows: for some it starts other programs (Ghostscript for EPS)
FORMATS = {"AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
FORMATS = sorted(FORMATS & Image.OPEN.keys())
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


def different_sizes(one, other) -> str:
    """The message of an error."""
    return f"Images of different sizes, {tuple(one)} and {tuple(other)} px: pass --image_size to crop them."


def match_images(real: str | Path, fake: str | Path) -> tuple[list[Path], list[Path]]:
    """Files of two folders (or lists) that belong together: of the same path below the folder, whatever the suffix.

    Raises:
        ValueError: some have no partner, or two.
    """
    files = []
    for path in (real, fake):
        folder, found = Path(path) if Path(path).is_dir() else None, {}
        for file in find_images(path):
            name = str((file.relative_to(folder) if folder else Path(file.name)).with_suffix(""))
            if name in found:
                raise ValueError(f"{found[name]} and {file} of {path} have the same name: which one is meant?")
            found[name] = file
        files.append(found)
    alone = sorted(files[0].keys() ^ files[1].keys())
    if alone:
        raise ValueError(
            f"{len(alone)} images of {real} and {fake} have no partner of the same name, first '{alone[0]}': name each "
            "reconstruction like its original."
        )
    return [files[0][name] for name in sorted(files[0])], [files[1][name] for name in sorted(files[0])]


class CroppedImages(torch.utils.data.Dataset):
    """Images as a protocol crops them; or pairs of them.

    Items are dicts: `index`; `original`, (3, H, W) of uint8; `reconstruction` likewise, where there are files of them;
    or, for an image that cannot be read, `error` in place of both.

    Args:
        data: of `load_images`.
        protocol: see [`Protocol`].
        size: side of the crops in pixels; `None`: as the files are, all of the same size.
        reconstructions: of `load_images`, in the order of `data`.
    """

    def __init__(self, data, protocol, size: int | None, reconstructions=None) -> None:
        self.data, self.reconstructions = data, reconstructions
        self.protocol, self.size = protocol, size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        try:
            image = decode_image(self.data[index]["image"], self.protocol.turned_by_exif)
            item = {"index": index, "original": self._tensor(image, self.size)}
            if self.reconstructions is not None:
                fake = decode_image(self.reconstructions[index]["image"], self.protocol.turned_by_exif)
                if fake.size != image.size and fake.size != (self.size, self.size):
                    raise RuntimeError(
                        f"{self.reconstructions[index]['image']['path']} is {fake.size} px, its original {image.size}: "
                        "a reconstruction must have the size of its original, before or after the crop "
                        f"(--image_size, now {self.size})."
                    )
                item["reconstruction"] = self._tensor(fake, self.size if fake.size == image.size else None)
            return item
        except ValueError as error:
            return {"index": index, "error": str(error)}

    def _tensor(self, image: Image.Image, size: int | None) -> torch.Tensor:
        return torch.from_numpy(self.protocol.crop(image, size).copy()).permute(2, 0, 1).contiguous()


def collate_images(items: list[dict]) -> dict:
    """Items of [`CroppedImages`] to a batch: tensors (B, 3, H, W), B the number of those that could be read; `index` of
    those; `skipped`, pairs of index and message.

    Raises:
        ValueError: images of different sizes.
    """
    read = [item for item in items if "error" not in item]
    sizes = sorted({tuple(item["original"].shape[1:]) for item in read})
    if len(sizes) > 1:
        raise ValueError(different_sizes(*sizes[:2]))
    batch = {
        "index": [item["index"] for item in read],
        "skipped": [(item["index"], item["error"]) for item in items if "error" in item],
    }
    for name in ("original", "reconstruction"):
        if read and name in read[0]:
            batch[name] = torch.stack([item[name] for item in read])
    return batch
