"""Training data: which images are taken, what an image is called, and how many unreadable ones a run puts up with."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import encoder_config
from test_loading import ROOT

from reading.files import dataset_of_files
from reading.sources import load_images
from train_hf import DataArguments, load_data
from training.arguments import VQRAETrainingArguments
from training.data import (
    SkippedImages,
    TooManyUnreadable,
    TrainTransform,
    collate,
    readable_images,
    sample_indices,
    split_files,
    with_pixels,
)
from training.token_passes import _identity


# Unreadable images ----------------------------------------------------------------------------------------------------


def spoil(folder: Path, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        (folder / f"bad-{number:03d}.png").write_bytes(b"no image")


def multiply(folder: Path, times: int) -> None:
    for file in list(folder.iterdir()):
        for number in range(times - 1):
            shutil.copy(file, folder / f"{file.stem}-{number}.png")


def batches_of(folder, transform, workers=0, batch_size=4, streaming=False):
    data = load_images(str(folder))
    data = data.to_iterable_dataset(num_shards=max(1, workers)) if streaming else data
    data = with_pixels(data, transform)
    loader = iter(torch.utils.data.DataLoader(data, batch_size, not streaming, collate_fn=collate, num_workers=workers))
    try:
        yield from loader
    finally:  # else its traceback keeps a loader that has failed, and torch waits long for the workers of later ones
        if workers:
            loader._shutdown_workers()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_of_nothing_that_can_be_read_stops_at_once(tmp_path, workers, streaming):
    spoil(tmp_path, 6)  # fewer than are put up with
    transform = TrainTransform(32, 0.5, skipped_list=tmp_path / "out" / "skipped.txt", max_unreadable_share=1.0)
    with pytest.raises(
        TooManyUnreadable, match=r"None of \d+ training images can be read, such as .*bad-00\d.png"
    ) as caught:
        next(batches_of(tmp_path, transform, workers, streaming=streaming))
    assert "\n" not in str(caught.value)  # also from a worker


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_stops_when_too_large_a_share_cannot_be_read(tmp_path, image_folder, workers, streaming):
    multiply(image_folder, 5)
    spoil(image_folder, 20)
    listing = tmp_path / "skipped.txt"

    def run(share, epochs=3):
        transform = TrainTransform(32, 0.5, skipped_list=listing, max_unreadable_share=share)
        for _ in range(epochs):
            for batch in batches_of(image_folder, transform, workers, streaming=streaming):
                assert batch["pixel_values"].std() > 0.01  # not grey
        return transform

    with pytest.raises(TooManyUnreadable, match="bad-0.*--max_unreadable_share 0.1") as caught:
        run(0.1)
    assert "\n" not in str(caught.value) and str(listing) in str(caught.value)
    assert run(0.3).count_skipped() == 20  # a quarter of the images
    assert len(listing.read_text().splitlines()) >= 20


@pytest.mark.parametrize("workers", [0, 2])
def test_a_handful_in_a_small_folder_stops_nothing(tmp_path, image_folder, workers):
    spoil(image_folder, 10)
    transform = TrainTransform(32, 0.5, skipped_list=tmp_path / "skipped.txt", max_unreadable_share=0.0)
    for _ in range(10):  # each of them many times
        for batch in batches_of(image_folder, transform, workers, batch_size=1):
            assert batch["pixel_values"].std() > 0.01
    assert transform.count_skipped() == 10


def test_one_more_than_a_handful_stops_a_run_that_allows_none(tmp_path, image_folder):
    spoil(image_folder, 11)
    transform = TrainTransform(32, 0.5, skipped_list=tmp_path / "skipped.txt", max_unreadable_share=0.0)
    with pytest.raises(TooManyUnreadable):
        list(batches_of(image_folder, transform))


def test_a_resumed_run_counts_anew_lists_nothing_twice_and_meets_the_same_substitutes(tmp_path, image_folder):
    spoil(image_folder, 11)
    listing = tmp_path / "skipped.txt"
    SkippedImages(listing).add("an image of before", "Cannot read")

    def run():
        transform = TrainTransform(32, 0.5, skipped_list=listing, max_unreadable_share=0.5)
        data = with_pixels(load_images(str(image_folder)), transform)
        return torch.stack([data[i]["pixel_values"] for i in reversed(range(len(data)))]), transform

    first, _ = run()
    second, transform = run()
    assert torch.equal(first, second) and transform.count_skipped() == 12
    assert len(listing.read_text().splitlines()) == 12
    # a few of them again: the list is long, yet this run has seen few
    transform = TrainTransform(32, 0.5, skipped_list=listing, max_unreadable_share=0.0)
    with_pixels(load_images(str(image_folder)), transform)[6:15]


def test_what_is_kept_of_unreadable_images_has_a_bound_and_each_line_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(SkippedImages, "MAX_NAMES", 50)
    path = tmp_path / "skipped.txt"
    ours, others = SkippedImages(path), SkippedImages(path)
    for number in range(200):
        (ours if number % 3 else others).add(f"{number // 2}.png", "Cannot\nread\tit")
    assert len(ours) == len(others) == 50 == len(path.read_text().splitlines())
    assert path.read_text().splitlines()[0] == "0.png\tCannot read it" and ours.latest()[0] == "49.png"
    # 30 lines that another process wrote since; what was there is not read again
    path.write_text("x" * 40 + "\n")
    ours = SkippedImages(path)
    assert len(ours) == 1
    with open(path, "r+b") as file:
        file.write(b"y" * 40)
        file.seek(0, os.SEEK_END)
        file.write(b"".join(b"%d.png\treason\n" % number for number in range(30)) + b"half a li")
    assert len(ours) == 31 and ours.latest()[-1] == "x" * 40


def test_names_of_any_bytes_can_be_listed(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    skipped = SkippedImages(tmp_path / "skipped.txt")
    skipped.add(name, "damaged")
    skipped.add(name, "damaged")
    assert len(skipped) == len(SkippedImages(tmp_path / "skipped.txt")) == 1 and skipped.latest() == [name]


def test_held_out_images_are_listed_once_over_resumptions(tmp_path, image_folder):
    spoil(image_folder, 2)
    files = sorted(image_folder.iterdir())
    for _ in range(2):
        assert len(readable_images(files, tmp_path / "skipped.txt")) == 12
    assert len((tmp_path / "skipped.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize("record", [{"path": None}, {"path": "0001.png"}, None])
def test_unreadable_images_of_one_name_or_none_are_counted(tmp_path, image_folder, record):
    """As datasets of the hub have them: bare names beside bytes, none, and rows without an image."""
    good = [{"path": str(file), "bytes": None} for file in sorted(image_folder.iterdir())]
    bad = [None if record is None else {**record, "bytes": b"%d" % number} for number in range(40)]
    transform = TrainTransform(32, 0.5, skipped_list=tmp_path / "skipped.txt")
    with pytest.raises(TooManyUnreadable, match="such as .*0001.png.*" if record and record["path"] else "such as"):
        for pair in zip(good * 4, bad):
            transform({"image": list(pair)})
    assert transform.count_skipped() == 11


def test_a_stretch_of_a_stream_that_cannot_be_read_is_left_out(tmp_path, image_folder):
    multiply(image_folder, 4)  # 48 images
    for number in range(70):
        (image_folder / f"b-9-{number:02d}.png").write_bytes(b"no image")  # in their midst
    transform = TrainTransform(32, 0.5, skipped_list=tmp_path / "skipped.txt", max_unreadable_share=1.0)
    pixels = torch.cat([batch["pixel_values"] for batch in batches_of(image_folder, transform, streaming=True)])
    assert 48 <= len(pixels) < 118 and (pixels.flatten(1).std(1) > 0.01).all() and transform.count_skipped() == 70


def test_two_processes_stop_and_name_files(tmp_path):
    (tmp_path / "images").mkdir()
    spoil(tmp_path / "images", 40)
    shutil.copy(ROOT / "examples" / "images" / "emoji-1f304.webp", tmp_path / "held.webp")
    (tmp_path / "held.txt").write_text("held.webp\n")
    model = {"encoder_config": encoder_config(), "decoder_patch_size": 8, "codebook_size": 64, "image_size": 32}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train_hf.py"]
    command += ["--model_config", str(model).replace("'", '"'), "--codebook_init", "gaussian", "--use_cpu"]
    command += ["--train_data", "images", "--eval_data", "held.txt", "--output_dir", "out", "--max_steps", "3"]
    command += ["--lpips_weight", "0", "--report_to", "none", "--dataloader_num_workers", "1"]
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode != 0 and "training images can be read" in result.stderr
    assert "bad-0" in result.stderr and not (tmp_path / "out" / "model.safetensors").exists()


# Names ----------------------------------------------------------------------------------------------------------------


def test_crops_of_equal_names_in_two_folders_differ_wherever_the_folders_lie(tmp_path, image_folder):
    for name in ("c1", "c2"):
        (image_folder / name).mkdir()
        shutil.copy(image_folder / "a-0.png", image_folder / name / "0001.png")
    moved = shutil.copytree(image_folder, tmp_path / "elsewhere" / "copy")

    def crops(folder):
        data = with_pixels(load_images(str(folder)), TrainTransform(32, 0.5))
        return [item["pixel_values"] for item in data]

    first, second = crops(image_folder), crops(moved)
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and len(first) == 14
    assert not torch.equal(first[-1], first[-2])  # of one picture, under two names
    # of the hub: paths may be bare names, beside the bytes
    data = (image_folder / "a-0.png").read_bytes(), (image_folder / "a-1.png").read_bytes()
    boxes = []
    for content in data:
        transform = TrainTransform(32, 0.5)
        transform.augment = lambda image: torch.rand(4)  # what the crop is drawn from
        boxes += transform({"image": [{"path": "0001.png", "bytes": content}]})["pixel_values"]
    assert not torch.equal(*boxes)


def test_crops_of_a_run_on_a_folder_are_those_of_the_folder(tmp_path, image_folder, monkeypatch):
    """`train_hf.py` splits the folder, and the rest is still named by what is below it."""
    moved = shutil.copytree(image_folder, tmp_path / "elsewhere" / "copy")
    monkeypatch.chdir(tmp_path)
    items = []
    for folder in (image_folder, moved):
        arguments = DataArguments(train_data=str(folder))
        train, _ = load_data(arguments, VQRAETrainingArguments("out", use_cpu=True), tmp_path / "skipped.txt")
        items.append(with_pixels(train, TrainTransform(32, 0.5))[:]["pixel_values"])
    assert len(items[0]) == 11 and torch.equal(*map(torch.stack, items))


def test_tokens_are_of_the_image_and_not_of_its_bare_name(tmp_path, image_folder):
    for name in ("c1", "c2"):
        (image_folder / name).mkdir()
        shutil.copy2(image_folder / "a-0.png", image_folder / name / "0001.png")  # its date as well
    moved = shutil.copytree(image_folder, tmp_path / "elsewhere" / "copy")
    identities = [[_identity(r["image"]) for r in load_images(str(folder))] for folder in (image_folder, moved)]
    assert identities[0] == identities[1] and identities[0][-1] != identities[0][-2]
    assert _identity({"path": "zip://a.jpg::/x.zip", "bytes": None})


# Which images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 3, 5, 7, 10, 12, 15, 25, 33, 100])
@pytest.mark.parametrize("holdout", [0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 0.99])
def test_the_share_that_is_held_out_is_right_and_spread_evenly(groups, holdout):
    files = [Path(f"{source:03d}-{number}.png") for source in range(groups) for number in range(2)]
    train, held_out = split_files(files, holdout, "-")
    sources = sorted({int(file.name[:3]) for file in held_out})
    assert len(sources) == min(max(1, round(holdout * groups)), groups - 1) and len(held_out) == 2 * len(sources)
    assert sorted(train + held_out) == files and split_files(files, holdout, "-") == (train, held_out)
    gaps = {after - before for before, after in zip(sources, sources[1:])}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_splits_whose_share_was_right_are_those_of_earlier_versions():
    files = [Path(f"{number:03d}.png") for number in range(326)]
    assert split_files(files, 0.1, None)[1] == files[::10]
    assert split_files(files[:25], 0.15, None)[1] == files[:25:7]


def options(tmp_path, seed=0):
    return VQRAETrainingArguments(str(tmp_path / "out"), use_cpu=True, seed=seed), tmp_path / "skipped.txt"


def names(dataset):
    return [Path(record["image"]["path"]).name for record in dataset]


def test_samples_are_drawn_from_the_whole_folder_in_its_order(tmp_path, image_folder):
    def load(seed, **limits):
        arguments = DataArguments(train_data=str(image_folder), group_separator="-", holdout=0.5, **limits)
        return [names(part) for part in load_data(arguments, *options(tmp_path, seed))]

    train, held_out = load(0)
    assert len(train) == len(held_out) == 6
    drawn = [load(seed, max_train_samples=3, max_eval_samples=3) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len({tuple(part[0]) for part in drawn}) > 1
    assert any(part[0][-1] in train[3:] for part in drawn)  # not the first
    for part in drawn:
        assert part[0] == sorted(part[0]) and len(part[0]) == 3 and set(part[0]) <= set(train)
        assert part[1] == drawn[0][1] and len(part[1]) == 3  # runs of other seeds are measured on the same images
    listed = (tmp_path / "out" / "heldout_images.txt").read_text().split()
    assert [Path(file).name for file in listed] == held_out  # all, also what is not measured
    assert sample_indices(5, 9, seed=0) == list(range(5))


def test_samples_of_a_stream_are_the_first_after_its_shuffle(tmp_path, image_folder, monkeypatch):
    stream = load_images(str(image_folder)).to_iterable_dataset()
    data = {"train": stream, "validation": load_images(str(image_folder))}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split, **kwargs: data[split])
    arguments = DataArguments(train_data="me/images", streaming=True, max_train_samples=5, shuffle_buffer=12)
    train, _ = load_data(arguments, *options(tmp_path))
    assert names(train) == names(stream.shuffle(seed=0, buffer_size=12))[:5]


@pytest.mark.parametrize("name", ["max_train_samples", "max_eval_samples", "max_unreadable_share"])
def test_options_out_of_range_are_named(name):
    with pytest.raises(ValueError, match=f"{name}.*-1"):
        DataArguments(train_data="images", **{name: -1})


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/images", "my/own/images", "nowhere/", "list.txt", "~/images"])
def test_a_path_that_does_not_exist_is_no_dataset_of_the_hub(tmp_path, name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    for arguments in ({"train_data": name}, {"train_data": str(tmp_path), "eval_data": name}):
        (tmp_path / "a.png").write_bytes(b"")
        with pytest.raises(ValueError) as caught:
            load_data(DataArguments(**arguments), *options(tmp_path))
        assert f"{name} does not exist: name a folder" in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_is_neither_a_folder_nor_a_dataset_is_told_in_a_line(tmp_path):
    with pytest.raises(ValueError, match="no folder my_imagse here.*check the path") as caught:  # offline, in tests
        load_data(DataArguments(train_data="my_imagse"), *options(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "images.csv").write_text("a.png\n")
    with pytest.raises(ValueError, match="is a file, but not a .txt list"):
        load_images(str(tmp_path / "images.csv"))


def test_drawing_samples_leaves_the_seeds_of_others_alone():
    random.seed(0)
    state = random.getstate()
    sample_indices(100, 5, seed=1)
    assert random.getstate() == state


def test_a_dataset_of_a_list_is_named_as_written(image_folder, monkeypatch):
    monkeypatch.chdir(image_folder.parent)
    (image_folder.parent / "list.txt").write_text("images/a-0.png\n./images/a-1.png\n")
    assert [record["image"]["path"] for record in load_images("list.txt")] == ["images/a-0.png", "images/a-1.png"]
    assert dataset_of_files([Path("images/a-0.png")])[0]["image"]["path"] == "images/a-0.png"
