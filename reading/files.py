"""Files of images: those below a folder, or in a list, and a dataset of them."""

import os
from collections import Counter
from pathlib import Path

import datasets

from reading.images import BELOW, EXTENSIONS
from reading.wording import counted


def find_images(path: str | Path) -> list[Path]:
    """Image files below a folder, or named by a `.txt` file with one path a line, sorted.

    In a folder, hidden files and what is in hidden folders are passed over. What else has no suffix of an image is
    left out, and it is said how many files that are.

    Raises:
        ValueError: there are none; or the folder, the list, or a file of the list does not exist.
    """
    path = Path(path)
    if path.is_dir():
        return images_among(files_below(path), path)
    if path.suffix != ".txt" or not path.is_file():
        raise ValueError(no_images_there(path))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}): save it so, for names of files to be told.") from error
    files = [Path(line) for line in lines if line.strip()]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{path} names {counted(len(missing), 'file that does', 'files that do')} not exist, first {missing[0]}."
        )
    return _some(files, path)


def files_below(folder: Path) -> list[Path]:
    visible = (
        path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return sorted(path for path in visible if path.suffix.lower() in EXTENSIONS or path.is_file())


def images_among(found: list[Path], folder: Path) -> list[Path]:
    files = [file for file in found if file.suffix.lower() in EXTENSIONS]
    others = [file for file in found if file.suffix.lower() not in EXTENSIONS]
    if others:
        kinds = Counter(file.suffix.lower() or "without a suffix" for file in others).most_common(3)
        say(
            f"{folder}: {counted(len(others), 'file is', 'files are')} left out, no image by its name "
            f"({', '.join(f'{count} {kind}' for kind, count in kinds)}), such as {others[0].relative_to(folder)}."
        )
    return _some(files, folder)


def _some(files: list[Path], path: Path) -> list[Path]:
    if not files:
        raise ValueError(f"No images in {path}: looked for {', '.join(sorted(EXTENSIONS))}, also in its subfolders.")
    for file in files:
        try:
            str(file).encode()
        except UnicodeEncodeError as error:  # an old disk's; no table can hold it
            raise ValueError(f"The name of the file {ascii(str(file))} is not in UTF-8: rename it.") from error
    return files


def no_images_there(path: str | Path) -> str:
    what = "is a file, but not a .txt list or one of images (.tar, .parquet, .zip)"
    what = what if os.path.isfile(path) else "does not exist"
    return (
        f"{path} {what}: name a folder of images, a .txt file with the path of an image in each line, or files of "
        "images (.tar, .parquet, .zip)."
    )


def say(text: str) -> None:
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
        of = f"of {real} and {fake}"
        raise ValueError(
            f"{counted(len(alone), f'image {of} has', f'images {of} have')} no partner of the same name, first "
            f"'{alone[0]}': name each reconstruction like its original."
        )
    return [files[0][name] for name in sorted(files[0])], [files[1][name] for name in sorted(files[0])]
