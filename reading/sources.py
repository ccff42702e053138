"""Where images come from: a folder, a list of files, or a dataset of the hub."""

import os
import re
from collections import Counter
from pathlib import Path

import datasets

from reading.images import BELOW, EXTENSIONS


NAME_ON_HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # dataset or model, or owner/dataset


def find_images(path: str | Path) -> list[Path]:
    """Image files below a folder, or named by a `.txt` file with one path a line, sorted.

    In a folder, hidden files and what is in hidden folders are passed over. What else has no suffix of an image is
    left out, and it is said how many files that are.

    Raises:
        ValueError: there are none; or the folder, the list, or a file of the list does not exist.
    """
    path = Path(path)
    if path.is_dir():
        files, others = [], []
        for file in sorted(path.rglob("*")):
            if any(part.startswith(".") for part in file.relative_to(path).parts):
                continue
            if file.suffix.lower() in EXTENSIONS:
                files.append(file)
            elif file.is_file():
                others.append(file)
        if others:
            kinds = Counter(file.suffix.lower() or "without a suffix" for file in others).most_common(3)
            _say(
                f"{path}: {len(others)} files are left out, they are no images by their names "
                f"({', '.join(f'{count} {kind}' for kind, count in kinds)}), such as {others[0].relative_to(path)}."
            )
    elif path.suffix == ".txt" and path.is_file():
        files = [Path(line) for line in path.read_text().splitlines() if line.strip()]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{path} names {len(missing)} files that do not exist, first {missing[0]}.")
    else:
        raise ValueError(_no_images_there(path))
    if not files:
        raise ValueError(f"No images in {path}: looked for {', '.join(sorted(EXTENSIONS))}, also in its subfolders.")
    return files


def _no_images_there(path: str | Path) -> str:
    what = "is a file, but not a .txt list" if os.path.isfile(path) else "does not exist"
    return f"{path} {what}: name a folder of images, or a .txt file with the path of an image in each line."


def _say(text: str) -> None:
    """Prints a line, on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def dataset_of_files(files: list[Path], folder: str | Path | None = None) -> datasets.Dataset:
    """A dataset with one column `image`, encoded bytes read when an item is.

    Args:
        files: paths of images.
        folder: where all of them are. `image_name` is then of the path below it.
    """
    paths = [str(file) if folder is None else f"{folder}{BELOW}{file.relative_to(folder)}" for file in files]
    return datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image(decode=False))


def load_images(
    name_or_path: str,
    split: str = "train",
    config_name: str | None = None,
    image_column: str = "image",
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """A dataset whose column `image` holds encoded images for `decode_image`.

    Args:
        name_or_path: a folder of images, a `.txt` file that lists images, or a dataset of the hub.
        split, config_name: of a hub dataset.
        image_column: the column of a hub dataset that holds the images.
        streaming: read a hub dataset as it is used, without downloading it first.
        revision: branch, tag or commit of a hub dataset.
        token: of the hub.

    Raises:
        ValueError: no images, or no such column; neither a folder, nor a list, nor a dataset that can be had.
    """
    if os.path.isdir(name_or_path):
        return dataset_of_files(find_images(name_or_path), name_or_path)
    if os.path.isfile(name_or_path):
        return dataset_of_files(find_images(name_or_path))
    if not NAME_ON_HUB.fullmatch(name_or_path) or name_or_path.endswith(".txt"):
        raise ValueError(_no_images_there(name_or_path))
    if not streaming:
        _say(f"Loading dataset {name_or_path}, split {split}: the first time, it is downloaded.")
    options = {"split": split, "streaming": streaming, "revision": revision, "token": token}
    try:
        dataset = datasets.load_dataset(name_or_path, config_name, **options)
    except (FileNotFoundError, ConnectionError) as error:  # of both kinds are what datasets raises
        raise ValueError(
            f"There is no folder {name_or_path} here, and no dataset of this name could be had from the hub "
            f"({' '.join(str(error).split())}): check the path, or the name and the connection."
        ) from error
    if dataset.column_names and image_column not in dataset.column_names:
        raise ValueError(f"{name_or_path} has no column '{image_column}', only {dataset.column_names}.")
    dataset = dataset.select_columns([image_column])
    if image_column != "image":
        dataset = dataset.rename_column(image_column, "image")
    return dataset.cast_column("image", datasets.Image(decode=False))


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
