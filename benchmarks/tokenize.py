"""How fast a dataset is tokenized: beside the encoder alone, LlamaGen's way and RAR's; and what memory that takes.

    python -m benchmarks.tokenize --model_name_or_path checkpoints/vqrae-dinov2-small --data my_images \\
        --output_dir runs/tokenize
    python -m benchmarks.tokenize --model_name_or_path checkpoints/vqrae-dinov2-small --memory_images 100000 \\
        --output_dir runs/tokenize_memory

The same images, crops and encoder each way, in turns, so that what else the machine does meets all alike:

encoder alone    tokens of the same batches, which are in memory already: no way can be faster
ours             read, decoded in workers, encoded, written as parquet
llamagen         batches of one image, two .npy files each, as its extract_codes_c2i.py has it (one view an image here)
rar              batches, all tokens kept as lists until one .json is written, and again line by line as .jsonl

Images are taken again and again until there are --images of them. Of the times of a way the median counts. With
--memory_images, a synthetic stream is tokenized instead, and the memory of all processes is printed as it goes. Writes
results.json and table.md.
"""

import argparse
import io
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from eval.commands import CommandParser, ends_in_one_line
from eval.files import write_whole
from eval.options import present_device, whole_number
from eval.results import library_versions
from generation.provenance import OF_TOKENS, Provenance
from generation.shards import Plan, shard_path
from generation.tokenize_images import VIEWS_IN_A_LOAD, write_shards
from generation.tokenizing import TokenRows, prepare
from reading.files import dataset_of_files, find_images
from reading.images import decode_image


parser = CommandParser(__doc__)
parser.add_argument("--model_name_or_path", required=True, help="A tokenizer: a folder, or a repository of the hub.")
parser.add_argument("--data", type=Path, help="A folder of images, or a .txt list.")
parser.add_argument("--images", type=whole_number(), default=512, help="How many (default: 512).")
parser.add_argument("--image_size", type=whole_number(), help="Side of the crops in pixels (default: the model's).")
parser.add_argument("--batch_size", type=whole_number(), default=32, help="Images at a time (default: 32).")
parser.add_argument("--shard_size", type=whole_number(), default=2000, help="Images in a shard (default: 2000).")
parser.add_argument("--num_workers", type=whole_number(0), default=1, help="That decode images (default: 1).")
parser.add_argument("--rounds", type=whole_number(), default=3, help="Times of each way (default: 3).")
parser.add_argument("--device", type=present_device, help="Default: cuda where there is one.")
parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="Of the encoder.")
parser.add_argument("--memory_images", type=whole_number(), help="Length of a synthetic stream, to look at memory.")
parser.add_argument("--output_dir", required=True, type=Path, help="Where the results go.")


class _Decoded(torch.utils.data.Dataset):
    """Images as a `Dataset` of tensors, (3, size, size) of uint8, with a label: what the others' loaders give."""

    def __init__(self, records: datasets.Dataset, views) -> None:
        self.records, self.views = records, views

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.views(decode_image(self.records[index]["image"]))[0], index % 1000


def provenance_of(rows: TokenRows, shard_size: int) -> Provenance:
    """What `write_shards` needs to know."""
    known = {"tokenizer_hash": rows.tokenizer_hash, "shard_size": shard_size, "split": "train"}
    return Provenance(**{name: None for name in Provenance.__dataclass_fields__} | known)


def ours(rows: TokenRows, records, folder: Path, args: argparse.Namespace) -> None:
    plan = Plan(records, args.shard_size, min(args.batch_size, VIEWS_IN_A_LOAD), lambda shard: True)
    with tqdm(disable=True) as bar:
        write_shards(plan, rows, folder, provenance_of(rows, args.shard_size), args.num_workers, bar)


def as_llamagen(rows: TokenRows, records, folder: Path, args: argparse.Namespace) -> None:
    (folder / "codes").mkdir()
    (folder / "labels").mkdir()
    loader = DataLoader(_Decoded(records, rows.views), batch_size=1, num_workers=args.num_workers)
    for number, (pixels, label) in enumerate(loader):
        tokens = rows.tokenize(pixels).reshape(1, 1, -1)
        np.save(folder / "codes" / f"{number}.npy", tokens.astype(np.int64))
        np.save(folder / "labels" / f"{number}.npy", label.numpy())


def as_rar(rows: TokenRows, records, folder: Path, args: argparse.Namespace) -> None:
    processed = []
    for pixels, labels in DataLoader(_Decoded(records, rows.views), args.batch_size, num_workers=args.num_workers):
        for tokens, label in zip(rows.tokenize(pixels), labels):
            processed.append({"class_id": label.item(), "tokens": tokens.ravel().tolist()})
    (folder / "pretokenized_0.json").write_text(json.dumps(processed))
    with (folder / "pretokenized.jsonl").open("w") as file:
        for item in json.loads((folder / "pretokenized_0.json").read_text()):
            file.write(json.dumps(item) + "\n")


def encoder_alone(batches: list[torch.Tensor], rows: TokenRows) -> None:
    for batch in batches:
        rows.tokenize(batch)


def timed(work: Callable[[Path], None], parent: Path) -> tuple[float, int, int]:
    """Seconds, and the files and bytes that were written."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    begin = time.perf_counter()
    work(folder)
    seconds = time.perf_counter() - begin
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    shutil.rmtree(folder)
    return seconds, len(files), size


def compare(rows: TokenRows, args: argparse.Namespace) -> dict:
    """Times of all ways."""
    files = find_images(args.data)
    records = dataset_of_files([files[number % len(files)] for number in range(args.images)])
    prepared = [
        prepare(records.__getitems__(range(start, min(start + args.batch_size, len(records)))), rows.views)
        for start in tqdm(range(0, len(records), args.batch_size), desc="Into memory", unit="batch")
    ]
    batches = [next(iter(load.views.values())).flatten(0, 1) for load in prepared]
    encoder_alone(batches[:2], rows)  # whatever is done once
    ways = {
        "encoder alone": lambda folder: encoder_alone(batches, rows),
        "ours": lambda folder: ours(rows, records, folder, args),
        "llamagen": lambda folder: as_llamagen(rows, records, folder, args),
        "rar": lambda folder: as_rar(rows, records, folder, args),
    }
    times, written = {name: [] for name in ways}, {}
    for number in tqdm(range(args.rounds * len(ways)), desc="Measuring", unit="run"):
        name = list(ways)[number % len(ways)]
        seconds, *written[name] = timed(ways[name], args.output_dir)
        times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        name: {
            "seconds": medians[name],
            "all_seconds": times[name],
            "of_the_encoder_alone": medians[name] / medians["encoder alone"],
            "images_per_second": len(records) / medians[name],
            "files": written[name][0],
            "bytes_per_image": written[name][1] / len(records),
        }
        for name in ways
    }


def synthetic(length: int, size: int) -> Iterator[dict]:
    """So many encoded images of noise, a little larger than they will be."""
    generator, encoded = np.random.default_rng(0), []
    for _ in range(64):
        file = io.BytesIO()
        noise = generator.integers(0, 256, (size + 8, size + 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file, format="JPEG")
        encoded.append(file.getvalue())
    for number in range(length):
        yield {"image": {"bytes": encoded[number % 64], "path": f"{number}.jpg"}}


def memory(rows: TokenRows, args: argparse.Namespace) -> dict:
    """MB of all processes together after so many images, each shared page counted in each."""
    features = datasets.Features({"image": datasets.Image(decode=False)})
    arguments = {"length": args.memory_images, "size": rows.views.image_size}
    stream = datasets.IterableDataset.from_generator(synthetic, features=features, gen_kwargs=arguments)
    me, seen, load_size = psutil.Process(), {}, min(args.batch_size, VIEWS_IN_A_LOAD)

    class Watched(Plan):
        def __iter__(self):
            for number, load in enumerate(super().__iter__()):
                if number % max(1, args.memory_images // load_size // 20) == 0:
                    processes = [me, *me.children(recursive=True)]
                    seen[number * load_size] = sum(process.memory_info().rss for process in processes) / 2**20
                    tqdm.write(f"{number * load_size:,} images: {seen[number * load_size]:,.0f} MB")
                yield load

    folder = Path(tempfile.mkdtemp(dir=args.output_dir))
    begin = time.perf_counter()
    plan = Watched(stream, args.shard_size, load_size, lambda shard: True)
    with tqdm(total=args.memory_images, unit="image") as bar:
        write_shards(plan, rows, folder, provenance_of(rows, args.shard_size), args.num_workers, bar)
    seconds = time.perf_counter() - begin
    assert shard_path(folder, "train", (args.memory_images - 1) // args.shard_size).is_file()
    shutil.rmtree(folder)
    return {"megabytes_after_images": seen, "seconds": seconds}


def table(result: dict) -> str:
    if "memory" in result:
        lines = ["| images so far | MB, all processes |", "| ---: | ---: |"]
        lines += [f"| {count:,} | {size:,.0f} |" for count, size in result["memory"]["megabytes_after_images"].items()]
        return "\n".join(lines) + "\n"
    lines = ["| | seconds | of the encoder alone | images a second | files | bytes an image |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, row in result["ways"].items():
        wrote = f"{row['files']:,} | {row['bytes_per_image']:,.0f}" if row["files"] else " | "
        lines.append(
            f"| {name} | {row['seconds']:.2f} | {row['of_the_encoder_alone']:.3f} | {row['images_per_second']:.1f} | "
            f"{wrote} |"
        )
    return "\n".join(lines) + "\n"


@ends_in_one_line()
def main() -> None:
    args = parser.parse_args()
    if (args.data is None) == (args.memory_images is None):
        parser.error("pass --data, or --memory_images")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = TokenRows(
        args.model_name_or_path,
        image_size=args.image_size,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
    )
    names = ("model_name_or_path", "images", "batch_size", "shard_size", "num_workers", "rounds", "dtype")
    settings = {name: getattr(args, name) for name in names} | {"image_size": rows.views.image_size}
    device = torch.cuda.get_device_name() if rows.model.device.type == "cuda" else "cpu"
    result = {"settings": settings, "device": device, "cores": len(psutil.Process().cpu_affinity())}
    result["versions"] = library_versions(OF_TOKENS)
    if args.memory_images:
        result["memory"] = memory(rows, args)
    else:
        result["ways"] = compare(rows, args)
    for name, text in (("results.json", json.dumps(result, indent=2)), ("table.md", table(result))):
        write_whole(args.output_dir / name, lambda path, text=text: path.write_text(text))
    print(f"\n{table(result)}")


if __name__ == "__main__":
    main()
