"""Where images come from: a folder, a list of files, or a dataset of the hub."""

from pathlib import Path

import datasets

from reading.images import EXTENSIONS


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
        ValueError: no images, or no such column.
    """
    if Path(name_or_path).is_dir() or (name_or_path.endswith(".txt") and Path(name_or_path).is_file()):
        return dataset_of_files(find_images(name_or_path))
    if not streaming:
        print(f"Loading dataset {name_or_path}, split {split}: the first time, it is downloaded.", flush=True)
    dataset = datasets.load_dataset(
        name_or_path, config_name, split=split, streaming=streaming, revision=revision, token=token
    )
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
