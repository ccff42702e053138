#!/usr/bin/env python
"""What a dataset of tokens holds, and whether it is whole.

    python -m generation.tokens_info tokens
    python -m generation.tokens_info tokens --decode 16

Reads every shard and compares it with provenance.json: images and rows, the type and range of tokens, the size of each
grid. Prints counts, codes in use, perplexity (2 to the entropy of the codes), bytes, and how fast the latest run was.
With --decode, rows from all over the dataset are decoded and drawn; the tokenizer must be the one that made them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from eval.commands import CommandParser, ends_in_one_line
from eval.options import present_device, whole_number
from generation.card import PICTURE, draw_rows, spread_rows
from generation.provenance import RUN, Provenance, check_tokenizer
from generation.shards import shard_info, shard_path
from generation.tokenizing import token_dtype
from reading.models import load_any
from reading.wording import counted


parser = CommandParser(__doc__)
parser.add_argument("folder", type=Path, help="What python -m generation.tokenize_images wrote.")
drawing = parser.add_argument_group("a picture")
drawing.add_argument("--decode", type=whole_number(), metavar="ROWS", help="Decode and draw so many rows.")
drawing.add_argument("--model_name_or_path", help="The tokenizer of the rows (default: as provenance.json says).")
drawing.add_argument("--output_file", type=Path, help=f"The picture, a PNG (default: {PICTURE} in the folder).")
drawing.add_argument("--device", type=present_device, help="Default: cuda where there is one.")


@dataclass
class Contents:
    """What all shards hold together.

    Args:
        shards: their paths, in order.
        counts: how often each code occurs, (codebook_size,).
        grids: how many rows have each grid, by (height, width) in tokens.
        num_bytes: of the shards.
    """

    shards: list[Path]
    counts: np.ndarray
    grids: dict[tuple[int, int], int]
    num_bytes: int

    @property
    def perplexity(self) -> float:
        shares = self.counts[self.counts > 0] / self.counts.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))


def read_shards(folder: Path, provenance: Provenance) -> Contents:
    """Reads all shards.

    Raises:
        ValueError: one is missing, damaged, or not as the provenance says; it is named.
    """
    if not provenance.finished:
        raise ValueError(f"{folder} is not finished: give the command that began it again, it goes on.")
    number_of = -(-provenance.num_images // provenance.shard_size)
    shards = [shard_path(folder, provenance.split, number) for number in range(number_of)]
    strays = {*folder.glob("*.parquet")} - {*shards}
    if strays:
        raise ValueError(f"{min(strays)} is none of the {number_of} shards that the provenance tells of: remove it.")
    found = Contents(shards, np.zeros(provenance.codebook_size, np.int64), {}, 0)
    num_images = num_rows = 0
    for shard in tqdm(shards, desc="Reading", unit="shard"):
        info = shard_info(shard)
        if info is None:
            raise ValueError(f"{shard} is missing or damaged: give the command that wrote it again.")
        if info["tokenizer_hash"] != provenance.tokenizer_hash:
            raise ValueError(
                f"{shard} was made by the tokenizer with hash {info['tokenizer_hash']}, {folder} by the one with "
                f"{provenance.tokenizer_hash}: remove the shard, and give the command that wrote it again."
            )
        readable = info["num_images"] - len(info["unreadable"])
        if info["num_rows"] != readable * provenance.rows_of_image:
            raise ValueError(
                f"{shard} has {counted(info['num_rows'], 'row')}, expected {provenance.rows_of_image} for each of "
                f"{counted(readable, 'image')}: remove it, and give the command that wrote it again."
            )
        num_images, num_rows = num_images + info["num_images"], num_rows + info["num_rows"]
        _look_at_rows(shard, provenance, found)
        found.num_bytes += shard.stat().st_size
    for name, value in (("images", num_images), ("rows", num_rows)):
        expected = getattr(provenance, f"num_{name}")
        if value != expected:
            raise ValueError(f"The shards of {folder} have {value} {name}, the provenance tells of {expected}.")
    return found


def _look_at_rows(shard: Path, provenance: Provenance, found: Contents) -> None:
    with pq.ParquetFile(shard) as file:
        wanted = np.dtype(token_dtype(provenance.codebook_size)).name
        kind = str(file.schema_arrow.field("image_tokens").type.value_type)
        if kind != wanted:
            raise ValueError(f"{shard} has tokens of {kind}, expected {wanted}.")
        for batch in file.iter_batches(columns=["image_tokens", "height", "width"]):
            tokens = batch["image_tokens"]
            sizes = np.stack([batch["height"].to_numpy(), batch["width"].to_numpy()], 1)
            if (tokens.value_lengths().to_numpy(zero_copy_only=False) != sizes.prod(1)).any():
                raise ValueError(f"{shard} has rows whose tokens are not height times width.")
            values = tokens.flatten().to_numpy()
            if len(values) and values.max() >= provenance.codebook_size:
                raise ValueError(
                    f"{shard} has the token {values.max()}, but there are only {provenance.codebook_size} codes."
                )
            found.counts += np.bincount(values, minlength=provenance.codebook_size)
            for size, count in zip(*np.unique(sizes, axis=0, return_counts=True)):
                found.grids[tuple(size.tolist())] = found.grids.get(tuple(size.tolist()), 0) + int(count)


def report(folder: Path, provenance: Provenance, found: Contents) -> str:
    """The lines that are printed."""
    tokens, used = int(found.counts.sum()), int((found.counts > 0).sum())
    grids = sorted(found.grids.items(), key=lambda grid: -grid[1])
    shown = ", ".join(f"{height} x {width} ({counted(count, 'row')})" for (height, width), count in grids[:3])
    lines = [
        f"tokenizer    {provenance.model_name_or_path}, {provenance.tokenizer_hash}",
        f"images       {provenance.num_images:,}, {provenance.num_unreadable:,} of them unreadable",
        f"rows         {provenance.num_rows:,} in {counted(len(found.shards), 'shard')}",
        f"grids        {shown}" + (f", and {counted(len(grids) - 3, 'other')}" if len(grids) > 3 else ""),
        f"tokens       {tokens:,}",
        f"codes used   {used:,} of {provenance.codebook_size:,} ({used / provenance.codebook_size:.1%})",
        f"perplexity   {found.perplexity:,.1f}",
        f"bytes        {found.num_bytes:,}, {found.num_bytes / tokens:.2f} a token",
    ]
    run = folder / RUN
    if run.is_file():
        latest = json.loads(run.read_text())
        speed = latest["tokens"] / latest["seconds"]
        lines.append(f"speed        {speed:,.0f} tokens a second ({latest['processes']} x {latest['device']})")
    return "\n".join(lines)


@ends_in_one_line()
def main() -> None:
    args = parser.parse_args()
    if args.decode is None and (args.model_name_or_path or args.output_file or args.device):
        parser.error("--model_name_or_path, --output_file and --device have no effect without --decode")
    provenance = Provenance.load(args.folder)
    found = read_shards(args.folder, provenance)
    print(report(args.folder, provenance, found))
    if args.decode is None:
        return
    name = args.model_name_or_path or provenance.model_name_or_path
    revision = provenance.revision if name == provenance.model_name_or_path else None
    model = load_any(name, torch.float32, revision=revision)
    check_tokenizer(model, provenance.tokenizer_hash, str(args.folder))
    model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    picture = args.output_file or args.folder / PICTURE
    draw_rows(model, spread_rows(found.shards, args.decode), picture)
    print(f"picture      {picture}")


if __name__ == "__main__":
    main()
