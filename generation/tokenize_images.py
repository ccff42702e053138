#!/usr/bin/env python
"""Tokenizes a dataset of images once, into parquet shards that every reader of parquet reads.

    python -m generation.tokenize_images --model_name_or_path checkpoints/vqrae-dinov2-small --data my_images \\
        --output_dir tokens

One row for each view of an image: key, image_tokens (flat, row by row), height and width in tokens, crop, flipped, and
label and text where the images have them. Beside the shards: provenance.json (which tokenizer, which settings),
README.md (a dataset card), decoded.png (rows, decoded), and, where there are any, unreadable_images.txt.

An interrupted run goes on when the same command is given again, and gives the same files; `accelerate launch -m
generation.tokenize_images ...` shares the shards among processes, and gives the same files. docs/tokenizing.md tells
the rest.
"""

import argparse
import bisect
import itertools
import json
import os
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import CommitOperationAdd, HfApi
from tqdm import tqdm

from eval.commands import CommandParser, ends_in_one_line
from eval.files import write_whole
from eval.options import add_source_options, present_device, whole_number
from eval.results import library_versions
from generation.card import PICTURE, dataset_card, draw_rows, spread_rows, write_card
from generation.provenance import OF_TOKENS, PROVENANCE, RUN, Provenance
from generation.shards import Plan, loader, shard_info, shard_path, split_name, write_shard
from generation.source import labels_and_texts, open_images, source_hash
from generation.tokenizing import TokenRows, prepare
from reading.models import load_any
from reading.wording import counted, one_of_processes


UNREADABLE = "unreadable_images.txt"
DRAWN = 16
VIEWS_IN_A_LOAD = 16  # that a worker hands over: many wait in shared memory
# of the provenance, what may differ when a run goes on: names, and what is known later
MAY_DIFFER = {"model_name_or_path", "revision", "source", "share_changed_by_dtype"}
MAY_DIFFER |= {"num_images", "num_unreadable", "num_rows"}

parser = CommandParser(__doc__)
what = parser.add_argument_group("tokenizer and images")
what.add_argument("--model_name_or_path", required=True, help="A tokenizer: a folder, or a repository of the hub.")
what.add_argument("--model_revision", help="Branch, tag or commit of a tokenizer of the hub.")
add_source_options(what, split="train", required=True, columns=("image", "label", "text"))
what.add_argument("--streaming", action="store_true", help="Read a dataset of the hub without downloading it first.")
what.add_argument("--max_samples", type=whole_number(), help="No more than the first so many images.")
what.add_argument("--license", help="Licence of the images, for the dataset's card, as the hub writes it: cc-by-4.0.")
views = parser.add_argument_group("views of an image")
views.add_argument("--image_size", type=whole_number(), help="Side of the crops in pixels (default: the model's).")
views.add_argument(
    "--native_size",
    action="store_true",
    help="Every image in its own size instead, cut to multiples of the patch; each row has a grid of its own.",
)
views.add_argument(
    "--crops",
    type=int,
    default=1,
    choices=(1, 10),
    help="1: the centre (default). 10: four corners and the centre, each also mirrored.",
)
views.add_argument(
    "--ten_crop_ratio",
    type=float,
    help="Ten crops are cut from an image whose shorter side is --image_size times this (default: 1.1).",
)
views.add_argument("--flip", action="store_true", help="A single crop also mirrored, as a row of its own.")
how = parser.add_argument_group("how")
how.add_argument("--output_dir", required=True, type=Path, help="Where the dataset of tokens goes.")
how.add_argument("--batch_size", type=whole_number(), default=32, help="Views at a time (default: 32).")
how.add_argument(
    "--shard_size",
    type=whole_number(),
    default=2000,
    help="Images in a shard (default: 2000): what a process does at a time, and at most loses when it is killed.",
)
how.add_argument(
    "--dtype",
    default="float32",
    choices=("float32", "bfloat16"),
    help="Of the encoder. bfloat16 changes some tokens; their share in the first batch is printed and recorded.",
)
how.add_argument(
    "--num_workers",
    type=whole_number(0),
    help="Processes that decode images (default: one for each core but one, 8 at most).",
)
how.add_argument("--device", type=present_device, help="Default: cuda where there is one.")
hub = parser.add_argument_group("the hub")
hub.add_argument("--push_to_hub", metavar="OWNER/NAME", help="Push the finished dataset to this repository.")
hub.add_argument("--private", action="store_true", help="If the repository is made, make it private.")
hub.add_argument("--revision", help="Push to this branch, which is made if there is none (default: main).")
hub.add_argument("--token", help="Token of the hub (default: that of `hf auth login`).")


def provenance_of(args: argparse.Namespace, rows: TokenRows, dataset) -> Provenance:
    """How the rows of this command will have been made."""
    label, config = rows.features.get("label"), rows.model.config
    return Provenance(
        model_name_or_path=rows.model_name_or_path,
        revision=rows.revision,
        tokenizer_hash=rows.tokenizer_hash,
        codebook_size=config.codebook_size,
        patch_size=config.decoder_patch_size,
        image_size=rows.views.image_size,
        crops=rows.views.crops,
        ten_crop_ratio=rows.views.ten_crop_ratio,
        flip=rows.views.flip,
        resample=rows.views.resample,
        dtype=rows.dtype,
        share_changed_by_dtype=None,
        batch_size=rows.batch_size,
        shard_size=args.shard_size,
        source=args.data,
        split=args.split,
        source_hash=source_hash(dataset),
        max_samples=args.max_samples,
        label_names=label.names if isinstance(label, datasets.ClassLabel) else None,
        versions=library_versions(OF_TOKENS),
    )


def begun(folder: Path, wanted: Provenance) -> Provenance | None:
    """What was begun in the folder and can go on; `None`: nothing was.

    Raises:
        ValueError: what was begun there is something else; it is named what.
    """
    if not (folder / PROVENANCE).is_file():
        if next(folder.glob("*.parquet"), None):
            raise ValueError(f"--output_dir {folder} has parquet files and no {PROVENANCE}: choose another one.")
        return None
    there = Provenance.load(folder)
    before, now = asdict(there), asdict(wanted)
    changed = [
        f"{name} was {before[name]} and is now {now[name]}"
        for name in before
        if name not in MAY_DIFFER and before[name] != now[name]
    ]
    if changed:
        raise ValueError(
            f"--output_dir {folder} was begun with something else: {'; '.join(changed)}. Give the same command again "
            "to go on, or choose another --output_dir."
        )
    return there


def share_changed(rows: TokenRows, dataset) -> float | None:
    """Of the tokens of the first batch, those that differ from fp32's; `None` where it has no readable image."""
    if rows.dtype == "float32":
        return 0.0
    first = prepare(list(itertools.islice(iter(dataset), rows.batch_size)), rows.views)
    if not first.views:
        return None
    batch = next(iter(first.views.values())).flatten(0, 1)[: rows.batch_size]
    tokens, device = rows.tokenize(batch), rows.model.device
    exact = load_any(rows.model_name_or_path, torch.float32, revision=rows.revision).to(device)
    with torch.inference_mode():
        expected = exact.get_image_tokens(batch.to(device).float() * (1 / 255)).cpu().numpy()
    share = float((tokens != expected).mean())
    print(f"In {rows.dtype}, {share:.2%} of the first batch's tokens differ from fp32's.", flush=True)
    return share


def shards_there(folder: Path, provenance: Provenance) -> set[int]:
    """The shards that need not be written again.

    Raises:
        ValueError: one is of another tokenizer.
    """
    found = set()
    for path in folder.glob(f"{split_name(provenance.split)}-*.parquet"):
        number = path.stem.rpartition("-")[2]
        if not number.isdecimal() or shard_path(folder, provenance.split, int(number)) != path:
            raise ValueError(f"{path} is no shard of this dataset: remove it.")
        info = shard_info(path)
        if info is not None and info["tokenizer_hash"] != provenance.tokenizer_hash:
            raise ValueError(
                f"{path} has tokens of the tokenizer {info['tokenizer_hash']}, not of {provenance.tokenizer_hash}: "
                "remove it."
            )
        if info is not None:
            found.add(int(number))
    return found


def write_shards(plan: Plan, rows: TokenRows, folder: Path, provenance: Provenance, workers: int, bar: tqdm) -> int:
    """Writes what one process is to write; how many tokens these were."""
    tokens, current, collected, begun = 0, None, None, time.perf_counter()

    def write() -> None:
        nonlocal tokens
        table = collected.finish()
        path = shard_path(folder, provenance.split, current)
        write_shard(path, table, collected.num_images, collected.unreadable, provenance.tokenizer_hash)
        tokens += collected.num_tokens
        bar.set_postfix_str(f"{tokens / (time.perf_counter() - begun):,.0f} tokens/s")

    for shard, prepared in loader(plan, rows.views, workers):
        if shard != current:
            if collected is not None:
                write()
            current, collected = shard, rows.collect()
        collected.add(prepared)
        for key, reason in collected.unreadable[len(collected.unreadable) - prepared.num_unreadable :]:
            tqdm.write(f"No row of {key}: {reason}")
        bar.update(len(prepared.images))
    if collected is not None:
        write()
    return tokens


def finish(
    folder: Path, provenance: Provenance, num_images: int | None, rows: TokenRows, license: str | None
) -> Provenance:
    """Writes what belongs to the whole, once all shards are there; the provenance last.

    Raises:
        ValueError: shards are missing, there are no images, or none that can be read.
    """
    infos = []
    while (info := shard_info(shard_path(folder, provenance.split, len(infos)))) is not None:
        infos.append(info)
    found = sum(info["num_images"] for info in infos)
    beyond = max(shards_there(folder, provenance), default=-1) + 1
    if not infos:
        raise ValueError(f"There are no images in {provenance.source}, split {provenance.split}.")
    if beyond != len(infos) or found != (num_images or found):
        raise ValueError(
            f"{folder} has {counted(found, 'image')} in {counted(len(infos), 'shard')}, expected "
            f"{num_images or 'more'}: give the same command again, it writes what is missing."
        )
    unreadable = [line for info in infos for line in info["unreadable"]]
    if len(unreadable) == found:
        key, reason = unreadable[0]
        raise ValueError(f"No image of {provenance.source} can be read ({found:,} tried); {key}: {reason}")
    if unreadable:
        text = "".join(f"{key}\t{reason}\n" for key, reason in unreadable)
        write_whole(folder / UNREADABLE, lambda path: path.write_text(text))
    done = replace(
        provenance,
        num_images=found,
        num_unreadable=len(unreadable),
        num_rows=sum(info["num_rows"] for info in infos),
    )
    paths = [shard_path(folder, done.split, number) for number in range(len(infos))]
    draw_rows(rows.model, spread_rows(paths, DRAWN), folder / PICTURE)
    write_card(folder, done, list(rows.features), license)
    done.save(folder)
    return done


def push(
    folder: Path,
    columns: list[str],
    license: str | None,
    repository: str,
    private: bool,
    branch: str | None,
    token: str | None,
) -> str:
    """Pushes a finished dataset, its provenance last and without paths of this machine; gives its address."""
    hub = HfApi(token=token)
    url = hub.create_repo(repository, repo_type="dataset", private=private or None, exist_ok=True)
    if branch:
        hub.create_branch(url.repo_id, branch=branch, repo_type="dataset", exist_ok=True)
    where = {"repo_id": url.repo_id, "repo_type": "dataset", "revision": branch}
    mine = [RUN, PROVENANCE, "README.md", "unfinished-*"]
    hub.upload_folder(**where, folder_path=folder, ignore_patterns=mine, commit_message="Image tokens")
    there = Provenance.load(folder)
    last = {
        "README.md": str(dataset_card(url.repo_id, there, columns, license)),
        PROVENANCE: json.dumps(asdict(there.public()), indent=2) + "\n",
    }
    operations = [CommitOperationAdd(name, text.encode()) for name, text in last.items()]
    hub.create_commit(**where, operations=operations, commit_message="How the tokens were made")
    return str(url)


@ends_in_one_line(smaller="--batch_size or --image_size")
def main() -> None:
    args = parser.parse_args()
    if not args.push_to_hub and (args.private or args.revision):
        parser.error("--private and --revision have no effect without --push_to_hub")
    split_name(args.split)  # before anything is read
    ten_crop_ratio = args.ten_crop_ratio
    if ten_crop_ratio is None and args.crops == 10:
        ten_crop_ratio = 1.1
    on_cpu = args.device is not None and args.device.type == "cpu"
    # processes wait for the slowest one at the end
    state = PartialState(cpu=on_cpu or not torch.cuda.is_available(), timeout=timedelta(weeks=4))
    dataset = open_images(args)
    if args.max_samples is not None:
        is_stream = isinstance(dataset, datasets.IterableDataset)
        dataset = dataset.take(args.max_samples if is_stream else min(args.max_samples, len(dataset)))
    if state.is_main_process:
        print(f"Loading the tokenizer {args.model_name_or_path} (downloaded if it is not here).", flush=True)
    rows = TokenRows(
        args.model_name_or_path,
        args.model_revision,
        image_size=args.image_size,
        native_size=args.native_size,
        crops=args.crops,
        ten_crop_ratio=ten_crop_ratio,
        flip=args.flip,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device or state.device,
        **labels_and_texts(dataset),
    )
    if state.is_main_process:
        count = "" if isinstance(dataset, datasets.IterableDataset) else f"{len(dataset):,} "
        print(f"Looking whether the {count}images of {args.data} are those of a run before.", flush=True)
    folder, wanted = args.output_dir, provenance_of(args, rows, dataset)
    provenance = begun(folder, wanted)
    state.wait_for_everyone()  # all have looked
    there = None
    if state.is_main_process:
        if provenance is None:
            provenance = replace(wanted, share_changed_by_dtype=share_changed(rows, dataset))
            provenance.save(folder)
        there = shards_there(folder, provenance)
    provenance, there = broadcast_object_list([provenance, there])
    shards, rank, count = sorted(there), state.process_index, state.num_processes

    def wanted_here(shard: int) -> bool:
        """Those that are missing take turns."""
        return shard not in there and (shard - bisect.bisect_left(shards, shard)) % count == rank

    load_size = max(1, min(args.batch_size, VIEWS_IN_A_LOAD) // len(rows.views.places))
    plan = Plan(dataset, args.shard_size, load_size, wanted_here, provenance.num_images)
    workers = args.num_workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    if there and state.is_main_process:
        print(f"{counted(len(there), 'shard is', 'shards are')} there already.", flush=True)
    begin = time.perf_counter()
    title = one_of_processes("Tokenizing", count)
    with tqdm(total=plan.count(), unit="image", desc=title, disable=not state.is_main_process) as bar:
        tokens = write_shards(plan, rows, folder, provenance, workers, bar)
    tokens = sum(gather_object([tokens]))  # waits for all
    seconds = time.perf_counter() - begin
    if not state.is_main_process:
        return
    print(f"Reading the shards again, and decoding {DRAWN} rows for the card.", flush=True)
    done = finish(folder, provenance, plan.num_images, rows, args.license)
    if tokens:
        run = {"tokens": tokens, "seconds": seconds, "processes": count, "device": str(rows.model.device)}
        write_whole(folder / RUN, lambda path: path.write_text(json.dumps(run, indent=2)))
        print(f"{tokens:,} tokens in {seconds:,.1f} s, {tokens / seconds:,.0f} a second.")
    unread = f", {done.num_unreadable:,} of them could not be read ({UNREADABLE})" if done.num_unreadable else ""
    print(f"{counted(done.num_rows, 'row')} of {counted(done.num_images, 'image')}{unread}: {folder}")
    if args.push_to_hub:
        print(f"Pushing to {args.push_to_hub}.", flush=True)
        where = args.push_to_hub, args.private, args.revision, args.token
        print(f"Pushed to {push(folder, list(rows.features), args.license, *where)}")


if __name__ == "__main__":
    main()
