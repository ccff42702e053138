"""Shards of a dataset of tokens: who writes which, and what is there already.

Shard `i` holds the rows of the images from `i * shard_size` on, and its bytes depend on these images and the settings
alone. So it does not matter which process writes it, in which run.
"""

import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import DataLoader, Dataset

from eval.files import write_whole
from generation.tokenizing import Prepared, Views, prepare


INFO = b"simvq_tokens"  # of the metadata of a shard
ROWS_IN_A_GROUP = 1000
MOST_SHARDS = 100_000  # five digits: names must sort


def shard_path(folder: str | Path, split: str, index: int) -> Path:
    """Where a shard is. Of a split like `train[:100]`, the name in front counts.

    Raises:
        ValueError: there are too many for their names.
    """
    if index >= MOST_SHARDS:
        raise ValueError(f"These are more than {MOST_SHARDS:,} shards: choose a larger --shard_size.")
    return Path(folder) / f"{split_name(split)}-{index:05d}.parquet"


def split_name(split: str) -> str:
    """The name of a split, as `load_dataset` will know it."""
    found = re.match(r"\w+", split)
    if not found:
        raise ValueError(f"--split must begin with the name of a split, got '{split}'.")
    return found[0]


def write_shard(path: Path, rows: pa.Table, num_images: int, unreadable: list[list[str]], tokenizer_hash: str) -> None:
    """Writes a shard whole or not at all. The same rows give the same bytes.

    Args:
        path: see `shard_path`.
        rows: with the features in their metadata.
        num_images: of the source, unreadable ones included.
        unreadable: key and reason of each that could not be read.
        tokenizer_hash: of the tokens.
    """
    info = {"num_images": num_images, "unreadable": unreadable, "tokenizer_hash": tokenizer_hash}
    rows = rows.replace_schema_metadata({**rows.schema.metadata, INFO: json.dumps(info)})

    def write(file: Path) -> None:
        # codes as indices into a dictionary, as every reader knows it: close to the bits that tell them apart
        with pq.ParquetWriter(file, rows.schema, compression="zstd") as writer:
            if len(rows):  # datasets cannot read a group without rows
                writer.write_table(rows, row_group_size=ROWS_IN_A_GROUP)

    write_whole(path, write)


def shard_info(path: Path) -> dict | None:
    """What `write_shard` was told, and `num_rows`; `None` if there is no such shard, or a damaged one."""
    try:
        metadata = pq.read_metadata(path)
        return json.loads(metadata.metadata[INFO]) | {"num_rows": metadata.num_rows}
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None


class Plan:
    """What one process reads, in order: `(shard, items)` with the items of a few images of one shard.

    Items are indices, or, of a stream, the records themselves. A stream is read to its end by every process, which
    leaves out what is not its own.

    Args:
        dataset: the source.
        shard_size: images in a shard.
        load_size: images at a time.
        wanted: whether this process is to write a shard.
        num_images: of a stream, where it is known from before.
    """

    def __init__(
        self,
        dataset: datasets.Dataset | datasets.IterableDataset,
        shard_size: int,
        load_size: int,
        wanted: Callable[[int], bool],
        num_images: int | None = None,
    ) -> None:
        self.dataset, self.shard_size, self.load_size, self.wanted = dataset, shard_size, load_size, wanted
        self.is_stream = isinstance(dataset, datasets.IterableDataset)
        self.num_images = num_images if self.is_stream else len(dataset)

    def shards(self) -> list[int] | None:
        """Those that this process will write; `None` where the end is not known."""
        if self.num_images is None:
            return None
        return [shard for shard in range(-(-self.num_images // self.shard_size)) if self.wanted(shard)]

    def count(self) -> int | None:
        """How many images this process will read; `None` where the end is not known."""
        shards = self.shards()
        if shards is None:
            return None
        return sum(min(self.shard_size, self.num_images - shard * self.shard_size) for shard in shards)

    def __iter__(self) -> Iterator[tuple[int, list]]:
        shards = self.shards()
        if shards is None:
            yield from self._read_to_the_end()
            return
        for shard in shards:
            start, end = shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images)
            if self.is_stream:
                yield from self._loads(shard, iter(self.dataset.skip(start).take(end - start)))
            else:
                yield from self._loads(shard, iter(range(start, end)))

    def _read_to_the_end(self) -> Iterator[tuple[int, list]]:
        shard = next(shard for shard in range(MOST_SHARDS + 1) if self.wanted(shard))
        records = iter(self.dataset.skip(shard * self.shard_size))
        while (first := next(records, None)) is not None:
            rest = islice(records, self.shard_size - 1)
            if self.wanted(shard):
                yield from self._loads(shard, _chained(first, rest))
            for _ in rest:  # of a shard that is another's, or is there
                pass
            shard += 1

    def _loads(self, shard: int, items: Iterator) -> Iterator[tuple[int, list]]:
        while load := list(islice(items, self.load_size)):
            yield shard, load


def _chained(first, rest: Iterator) -> Iterator:
    yield first
    yield from rest


class _Loads(Dataset):
    """Loads of a plan to what is tokenized; in the workers of a `DataLoader`."""

    def __init__(self, dataset: datasets.Dataset | None, views: Views) -> None:
        self.dataset, self.views = dataset, views

    def __getitems__(self, load: tuple[int, list]) -> tuple[int, Prepared]:
        shard, items = load
        records = items if self.dataset is None else self.dataset.__getitems__(items)
        return shard, prepare(records, self.views)


def loader(plan: Plan, views: Views, num_workers: int) -> DataLoader:
    """`(shard, Prepared)` for each load of a plan, in its order, made in workers. Only the process itself reads a
    stream; workers get its records."""
    return DataLoader(
        _Loads(None if plan.is_stream else plan.dataset, views),
        batch_sampler=plan,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
    )


def _as_it_is(load: tuple[int, Prepared]) -> tuple[int, Prepared]:
    return load
