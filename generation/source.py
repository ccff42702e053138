"""The source of a dataset of tokens: its images, and whether it is still the same."""

import argparse
import hashlib
import os

import datasets
import pyarrow.compute as pc

from eval.commands import ends_in_one_line
from reading.images import BELOW, image_name
from reading.sources import open_source


def open_images(args: argparse.Namespace) -> datasets.Dataset | datasets.IterableDataset:
    """The source: columns `image` (encoded) and, where it has them, `label` and `text`."""
    columns = {f"{name}_column": getattr(args, f"{name}_column") for name in ("image", "label", "text")}
    with ends_in_one_line(ValueError):  # such as a split that it does not have
        return open_source(args.data, args.split, args.dataset_config_name, args.streaming, token=args.token, **columns)


def labels_and_texts(dataset: datasets.Dataset | datasets.IterableDataset) -> dict:
    """The features of the columns `label` and `text`, of those that there are; where a stream does not tell, after its
    first image."""
    if dataset.features is not None:
        return {name: dataset.features[name] for name in ("label", "text") if name in dataset.features}
    kinds = {name: value for name, value in next(iter(dataset), {}).items() if name in ("label", "text")}
    return {name: datasets.Value("int64" if isinstance(value, int) else "string") for name, value in kinds.items()}


def source_hash(dataset: datasets.Dataset | datasets.IterableDataset) -> str:
    """SHA-256 that tells whether a source is still the same: of the names of all images, in order, the sizes of their
    files or bytes, their labels and captions. Of a stream, which would have to be read for that, of the first image."""
    digest = hashlib.sha256()
    if isinstance(dataset, datasets.IterableDataset):
        for record in dataset.take(1):
            digest.update(repr((image_name(record["image"]), record.get("label"), record.get("text"))).encode())
        return digest.hexdigest()
    for table in dataset.with_format("arrow").iter(1000):
        images, columns = table["image"].combine_chunks(), [name for name in table.column_names if name != "image"]
        paths, sizes = images.field("path").to_pylist(), pc.binary_length(images.field("bytes")).to_pylist()
        for path, size in zip(paths, sizes):
            if size is None and path and os.path.isfile(path):
                size = os.path.getsize(path)
            digest.update(repr(((path or "").rpartition(BELOW)[2], size)).encode())
        digest.update(repr(table.select(columns).to_pydict()).encode())
    return digest.hexdigest()
