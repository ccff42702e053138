"""Where images come from: what a path or a name is, and the dataset of its images, labels and captions."""

import glob
import hashlib
import json
import os
import re
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from reading.columns import WANTED, bring_columns
from reading.files import dataset_of_files, files_below, find_images, images_among, no_images_there, say
from reading.images import BELOW, EXTENSIONS
from reading.wording import did_you_mean


NAME_ON_HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # dataset or model, or owner/dataset
ARCHIVES = {".tar": "webdataset", ".parquet": "parquet", ".zip": "zip"}  # kinds of files that hold many images
NAMES = {"image": "images"} | {kind: suffix for suffix, kind in ARCHIVES.items()}
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # of the shell: {000..012}


# What a path or a name is --------------------------------------------------------------------------------------------


def is_path(name: str) -> bool:
    """Whether a name is a path on this machine: something lies there, or it can be nothing else."""
    is_archive = Path(name).suffix.lower() in ARCHIVES and "://" not in name  # also a pattern of many
    return os.path.exists(name) or os.path.isabs(name) or is_archive


def is_on_hub(name: str) -> bool:
    """Whether a name is one of the hub."""
    return bool(NAME_ON_HUB.fullmatch(name)) and not is_path(name)


def public_name(name: str) -> str:
    """What others may read of a name: of a path on this machine its last part alone."""
    return Path(os.path.abspath(name)).name if is_path(name) else name


@dataclass
class Source:
    """What a path or a name is, see `find_source`.

    Args:
        name: as it was given.
        kind: "folder", "list" or "zip", which are files of images; "webdataset" or "parquet", files that hold images;
            "saved", a folder of `save_to_disk`; or "hub", a dataset of this name.
        images: the files of images; a zip's lie in the cache.
        folders: by file of a folder or a zip, that folder, or the one with what is in that zip.
        splits: of files that hold images, and of what was saved: the files (of the latter none) by the name of the
            split.
    """

    name: str
    kind: str
    images: list[Path] = field(default_factory=list)
    folders: dict[Path, Path] = field(default_factory=dict)
    splits: dict[str, list[str]] = field(default_factory=dict)

    @property
    def has_splits(self) -> bool:
        """Whether a split can be asked for: always on the hub; here where there are several."""
        return self.kind == "hub" or len(self.splits) > 1

    def split(self, wanted: str) -> str | None:
        """The split that is read where `wanted` is: where there is but one, that one; of files of images, none.

        Raises:
            ValueError: there are several, and not this one; or a part of one (`train[:100]`), which the hub alone has.
        """
        if self.kind == "hub" or wanted in self.splits:
            return wanted
        if len(self.splits) > 1 or "[" in wanted:
            meant = did_you_mean(wanted, self.splits) or "."
            raise ValueError(f"{self.name} has no split '{wanted}', only {', '.join(self.splits) or 'one'}{meant}")
        return next(iter(self.splits), None)


def find_source(name_or_path: str | Path) -> Source:
    """What a path or a name is:

    - a folder of images, or of tars, of parquet files or of zips, by the names of the files in it; or one that
      `save_to_disk` wrote;
    - a `.txt` file that lists images, a `.tar`, a `.parquet` or a `.zip`; several of these as `data/*.parquet` or
      `data/{000..012}.tar`, which may also be URLs;
    - else the name of a dataset of the hub.

    Splits of tars and parquet files are told from their names, as everywhere in `datasets` (`validation-0001.tar`).

    Raises:
        ValueError: there is nothing there; files of several kinds; or a dataset of tokens.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if path.is_dir():
        return _source_of_folder(name, path)
    if path.is_file() and path.suffix == ".txt":
        return Source(name, "list", find_images(path))
    is_pattern = any(character in name for character in "*?{") or "://" in name
    kind = ARCHIVES.get(path.suffix.lower())
    if kind and (path.is_file() or is_pattern):
        return _source_of_archives(name, kind, _expand(name))
    if path.suffix == ".txt" or not is_on_hub(name):
        raise ValueError(no_images_there(name))
    return Source(name, "hub")


def _source_of_folder(name: str, folder: Path) -> Source:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return Source(name, "saved", splits={split: [] for split in splits})
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return Source(name, "saved")
    found = files_below(folder)
    kinds = Counter("image" if f.suffix.lower() in EXTENSIONS else ARCHIVES.get(f.suffix.lower()) for f in found)
    del kinds[None]
    if kinds["parquet"] and (folder / "provenance.json").is_file():
        raise ValueError(f"{name} is a dataset of tokens (it has a provenance.json), where images are needed.")
    if len(+kinds) > 1:
        raise ValueError(
            f"{name} holds files of several kinds, {' and '.join(f'{n} {NAMES[kind]}' for kind, n in kinds.items())}: "
            f"keep one of them there, or name some of the files, such as '{folder / '*.parquet'}'."
        )
    kind = next(iter(+kinds), "image")
    if kind == "image":
        images = images_among(found, folder)
        return Source(name, "folder", images, dict.fromkeys(images, folder))
    if kind == "zip":
        return _source_of_archives(name, kind, [str(file) for file in found if file.suffix.lower() == ".zip"])
    by_split = datasets.load_dataset_builder(kind, data_dir=str(folder)).config.data_files
    return Source(name, kind, splits={str(split): list(files) for split, files in by_split.items()})


def _source_of_archives(name: str, kind: str, files: list[str]) -> Source:
    if kind != "zip":
        return Source(name, kind, splits={"train": files})
    source = Source(name, kind)
    for file in files:
        folder = _unzipped(Path(file))
        images = images_among(files_below(folder), folder)
        source.images += images
        source.folders |= dict.fromkeys(images, folder)
    return source


def _expand(name: str) -> list[str]:
    """`a-{000..002}.tar` and `a-*.tar` as names of files.

    Raises:
        ValueError: one does not exist, or none does.
    """
    if found := RANGE.search(name):
        first, last = found.groups()
        numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
        return [file for n in numbers for file in _expand(name[: found.start()] + n + name[found.end() :])]
    if "://" in name:
        return [name]
    files = [name] if os.path.isfile(name) else sorted(glob.glob(name, recursive=True))
    if not files:
        raise ValueError(no_images_there(name))
    return files


def _unzipped(archive: Path) -> Path:
    """The folder, in the cache of `datasets` and of the zip's name, with what a zip holds: reading one image of it
    would read the list of all that is in it. Written beside and renamed, as several processes may want it, and be
    ended."""
    status = archive.stat()
    identity = hashlib.sha256(f"{archive.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "archives" / identity[:32]
    if folder.is_dir():
        return folder / archive.name
    say(f"Unpacking {archive} into {folder}, the first time.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        try:
            with zipfile.ZipFile(archive) as content:
                content.extractall(Path(unfinished) / "all" / archive.name)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged; a password; a rare format
            raise ValueError(f"{archive} cannot be unpacked: {error}") from error
        try:
            (Path(unfinished) / "all").rename(folder)
        except OSError:
            if not folder.is_dir():  # by another process, in the meantime
                raise
    return folder / archive.name


# Its images, labels and captions -------------------------------------------------------------------------------------


def open_source(
    source: str | Path | Source,
    split: str = "train",
    config_name: str | None = None,
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    wanted: tuple[str, ...] = WANTED,
) -> datasets.Dataset | datasets.IterableDataset:
    """A dataset of images, with labels and captions where the source has them.

    Args:
        source: a path or a name, see `find_source`; or what that returned.
        split: where there are several; of a source with but one, that one is read.
        config_name: of a hub dataset.
        streaming: read as it is used, without downloading or converting it first.
        revision: branch, tag or commit of a hub dataset.
        token: of the hub.
        image_column, label_column, text_column: where the columns have other names than usual ones, see
            `bring_columns`. A field of a `.json` beside an image is `json.caption`.
        wanted: which of the columns to bring.

    Returns:
        Columns `image`, encoded images for `decode_image` (`datasets.Image(decode=False)`); and where they are, `label`
        (`ClassLabel` with the names of the classes; an integer where nothing tells them; a string in a stream of
        strings) and `text` (a string). Of a folder, of a zip, classes are the sub-folders.

    Raises:
        ValueError: see `find_source`; no such split or column; a dataset that cannot be had.
    """
    source = source if isinstance(source, Source) else find_source(source)
    given = {"image": image_column, "label": label_column, "text": text_column}
    if source.images:
        dataset = _dataset_of_source(source, wanted)
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    elif source.kind == "saved":
        dataset = datasets.load_from_disk(source.name)
        dataset = dataset[source.split(split)] if source.splits else dataset
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    elif source.kind == "hub":
        dataset = _load_from_hub(source.name, config_name, split, streaming, revision, token)
    else:
        split = source.split(split)
        data_files = {split: source.splits[split]}
        if not streaming:
            say(f"Loading {source.name}: the first time, it is converted into the cache of datasets.")
        dataset = datasets.load_dataset(source.kind, data_files=data_files, split=split, streaming=streaming)
    dataset, told = bring_columns(dataset, source.name, wanted, given)
    if told:
        say(told)
    return dataset


def load_images(source: str | Path | Source, split: str = "train", **options):
    """The images alone: `open_source` with a single column `image`."""
    return open_source(source, split, wanted=("image",), **options)


def _dataset_of_source(source: Source, wanted: tuple[str, ...]) -> datasets.Dataset:
    if not source.folders:
        return dataset_of_files(source.images)
    below = [file.relative_to(source.folders[file]) for file in source.images]
    several = len({*source.folders.values()}) > 1  # zips: names in them may be the same, their own belong to those
    roots = [source.folders[file].parent if several else source.folders[file] for file in source.images]
    paths = [f"{root}{BELOW}{file.relative_to(root)}" for file, root in zip(source.images, roots)]
    columns = {"image": paths}
    features = {"image": datasets.Image(decode=False)}
    folders = [path.parts[:-1] for path in below]
    above = len(os.path.commonprefix(folders))  # a zip may hold one folder with all in it
    classes = [parts[above] if len(parts) > above else None for parts in folders]
    names = sorted({name for name in classes if name is not None})
    if "label" in wanted and len(names) > 1:
        numbers = {name: number for number, name in enumerate(names)}
        columns["label"], features["label"] = [numbers.get(name) for name in classes], datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _load_from_hub(name, config_name, split, streaming, revision, token):
    if not streaming:
        say(f"Loading dataset {name}, split {split}: the first time, it is downloaded.")
    options = {"split": split, "streaming": streaming, "revision": revision, "token": token}
    try:
        return datasets.load_dataset(name, config_name, **options)
    except (FileNotFoundError, ConnectionError) as error:  # of both kinds are what datasets raises
        raise ValueError(
            f"There is no folder {name} here, and no dataset of this name could be had from the hub "
            f"({' '.join(str(error).split())}): check the path, or the name and the connection."
        ) from error
