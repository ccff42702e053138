#!/usr/bin/env python
"""A dataset of tokens in the files of other projects.

    python -m generation.export_tokens tokens --format llamagen --output_dir codes_flip_ten_crop
    python -m generation.export_tokens tokens --format rar --output_dir rar

llamagen    NAME{size}_codes/{n}.npy, int64 (1, views, tokens), and NAME{size}_labels/{n}.npy, int64 (1,): two files an
            image, as github.com/FoundationVision/LlamaGen, autoregressive/train/extract_codes_c2i.py has them. Its
            loader draws one of the views only where "flip" is in the path, wants NAME to be imagenet, and counts on
            1,281,167 images unless it is changed (dataset/imagenet.py).
rar         pretokenized.jsonl, {"class_id": ..., "tokens": [...]} a row, as github.com/bytedance/1d-tokenizer,
            scripts/pretokenization.py has it.

Both need labels, and grids of one size.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from eval.commands import CommandParser, ends_in_one_line
from eval.files import write_folder_whole, write_whole
from generation.provenance import Provenance
from generation.shards import shard_path
from reading.wording import counted


parser = CommandParser(__doc__)
parser.add_argument("folder", type=Path, help="What python -m generation.tokenize_images wrote.")
parser.add_argument("--format", required=True, choices=("llamagen", "rar"), help="Whose files.")
parser.add_argument("--output_dir", required=True, type=Path, help="Where they go: a folder that is not there yet.")
parser.add_argument("--name", help="Name of the dataset in those of llamagen's folders (default: imagenet).")


def images(folder: Path, provenance: Provenance) -> Iterator[tuple[int, np.ndarray]]:
    """Label and tokens, (views, tokens), of each image, in order.

    Raises:
        ValueError: the dataset is not finished, or has no labels that are numbers, or images in their own sizes.
    """
    if not provenance.finished:
        raise ValueError(f"{folder} is not finished: give the command that began it again, it goes on.")
    if provenance.image_size is None:
        raise ValueError(f"{folder} has images in their own sizes: these formats have one size. Tokenize with a size.")
    number_of = -(-provenance.num_images // provenance.shard_size)
    with tqdm(total=provenance.num_rows, unit="row", desc="Exporting") as bar:
        for number in range(number_of):
            with pq.ParquetFile(shard_path(folder, provenance.split, number)) as file:
                schema = file.schema_arrow
                if "label" not in schema.names or not pa.types.is_integer(schema.field("label").type):
                    raise ValueError(f"{folder} has no labels that are numbers: these formats need a class an image.")
                # rows of an image follow each other
                for batch in file.iter_batches(1000 * provenance.rows_of_image, columns=["image_tokens", "label"]):
                    labels = batch["label"].to_pylist()
                    if None in labels:
                        raise ValueError(f"{folder} has images without a label: these formats need a class an image.")
                    tokens = batch["image_tokens"].flatten().to_numpy().reshape(len(labels), -1).astype(np.int64)
                    for start in range(0, len(labels), provenance.rows_of_image):
                        yield labels[start], tokens[start : start + provenance.rows_of_image]
                        bar.update(provenance.rows_of_image)


def export_llamagen(folder: Path, provenance: Provenance, output: Path, name: str = "imagenet") -> None:
    """Two files an image."""

    def write(path: Path) -> None:
        codes, labels = (path / f"{name}{provenance.image_size}_{kind}" for kind in ("codes", "labels"))
        codes.mkdir(parents=True)
        labels.mkdir()
        for number, (label, tokens) in enumerate(images(folder, provenance)):
            np.save(codes / f"{number}.npy", tokens[None])
            np.save(labels / f"{number}.npy", np.array([label], np.int64))

    write_folder_whole(output, write)


def export_rar(folder: Path, provenance: Provenance, output: Path) -> None:
    """One line a row."""

    def write(path: Path) -> None:
        with path.open("w") as file:
            for label, tokens in images(folder, provenance):
                for row in tokens.tolist():
                    file.write(json.dumps({"class_id": label, "tokens": row}) + "\n")

    write_whole(output / "pretokenized.jsonl", write)


@ends_in_one_line()
def main() -> None:
    args = parser.parse_args()
    if args.name and args.format != "llamagen":
        parser.error("--name has no effect: it is for --format llamagen")
    if args.output_dir.is_dir() and any(args.output_dir.iterdir()):
        raise ValueError(f"--output_dir {args.output_dir} is not empty: choose a folder that is not there yet.")
    provenance = Provenance.load(args.folder)
    if args.format == "rar":
        export_rar(args.folder, provenance, args.output_dir)
    else:
        export_llamagen(args.folder, provenance, args.output_dir, args.name or "imagenet")
        if provenance.rows_of_image > 1 and "flip" not in str(args.output_dir):
            print('LlamaGen draws one of several views only where "flip" is in the path: rename the folder.')
    print(f"{counted(provenance.num_rows, 'row')}: {args.output_dir}")


if __name__ == "__main__":
    main()
