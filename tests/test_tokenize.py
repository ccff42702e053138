"""A dataset of images becomes a dataset of tokens."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_config
from huggingface_hub import DatasetCard
from PIL import Image
from test_docs import blocks
from test_loading import ROOT
from torchvision.transforms.v2 import functional

from configuration_simvq_gan import SimVQGANConfig
from generation import tokenize_images
from generation.provenance import Provenance, check_tokenizer
from generation.shards import Plan
from generation.tokenizing import MOST_BATCHES, Collected, TokenRows, Views, prepare, row_features, token_dtype
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from modeling_simvq_gan import SimVQGANModel
from reading.images import decode_image
from reading.models import tokenizer_hash


def tokenize(*arguments, output="tokens", fails=False, workers=0):
    """Runs the command here; gives what it wrote, but for run.json, or with `fails` what it says."""
    command = ["--model_name_or_path", "model", "--data", "images", "--output_dir", output, "--shard_size", "3"]
    command += ["--batch_size", "4", "--num_workers", workers, *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tokenize_images.py", *map(str, command)])
        if fails:
            with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as inner:
                said = []
                inner.setattr(sys.stderr, "write", said.append)
                tokenize_images.main()
            assert end.value.code
            return "".join(said)
        tokenize_images.main()
    return files(output)


def files(folder="tokens") -> dict[str, bytes]:
    """All that belongs to the dataset."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "run.json"}


def rows_of(folder="tokens") -> list[dict]:
    return datasets.load_dataset(str(folder), split="train", cache_dir="cache").to_list()


def alone(image, model="model", size=32):
    """The tokens of one image by the processor and the model, (h, w)."""
    model = VQRAEModel.from_pretrained(model).eval()
    pixels = VQRAEImageProcessor.for_image_size(size)(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        return model.get_image_tokens(pixels)[0].numpy()


# Rows ---------------------------------------------------------------------------------------------------------------


def test_rows_are_the_tokens_of_each_image_with_its_name_and_class(work):
    tokenize()
    rows = rows_of()
    paths = sorted((work / "images").rglob("*.png"))
    assert [row["key"] for row in rows] == [str(path.relative_to(work / "images")) for path in paths]
    assert [row["label"] for row in rows] == [0] * 5 + [1] * 9
    for row, path in zip(rows, paths):
        assert np.array_equal(np.reshape(row["image_tokens"], (row["height"], row["width"])), alone(Image.open(path)))
        assert (row["crop"], row["flipped"]) == (0, False)
    features = datasets.load_dataset("tokens", split="train", cache_dir="cache").features
    assert features["label"].names == ["cats", "dogs"]
    assert features["image_tokens"].feature.dtype == "uint16"


@pytest.mark.parametrize("reader", ["pandas", "polars", "duckdb"])
def test_others_read_the_shards(work, reader):
    library = pytest.importorskip(reader)
    tokenize("--max_samples", 2)
    if reader == "duckdb":
        tokens = library.sql("select image_tokens from 'tokens/train-*.parquet'").fetchall()[1][0]
    else:
        tokens = library.read_parquet("tokens/train-00000.parquet")["image_tokens"][1]
    assert list(tokens) == rows_of()[1]["image_tokens"]


def test_flip_gives_the_mirrored_crop_a_row_of_its_own(work):
    tokenize("--flip", "--max_samples", 2)
    rows = rows_of()
    assert [row["flipped"] for row in rows] == [False, True] * 2
    image = Image.open(work / "images" / "cats" / "00.png")
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.array_equal(np.reshape(rows[1]["image_tokens"], (4, 4)), alone(mirrored))


@pytest.mark.parametrize("ratio", [1.1, 1.4])
def test_ten_crops_are_torchvision_s_of_a_larger_centre(ratio):
    """As in LlamaGen; mirrored corners have the number of the corner that they were."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    side = int(48 * ratio)
    centre = VQRAEImageProcessor.for_image_size(side)(image, do_rescale=False, return_tensors="pt").pixel_values[0]
    theirs = torch.stack(functional.ten_crop(centre, 48))  # those of the mirrored image have corners of that
    ours = Views(8, 48, 10, ratio)
    assert ours.places == [(crop, False) for crop in range(5)] + [(crop, True) for crop in range(5)]
    assert torch.equal(ours(image)[:5], theirs[:5])
    assert torch.equal(ours(image)[[6, 5, 8, 7]], theirs[5:9])
    assert torch.equal(ours(image)[9], ours(image)[4].flip(-1))


def test_ten_crops_are_ten_rows(work):
    tokenize("--crops", 10, "--max_samples", 4)
    rows = rows_of()
    assert [(row["key"], row["crop"], row["flipped"]) for row in rows[10:20]] == [
        ("cats/01.png", crop, flipped) for flipped in (False, True) for crop in range(5)
    ]
    assert len(rows) == 40 and Provenance.load("tokens").rows_of_image == 10


def test_images_in_their_own_sizes_have_grids_of_their_own(work):
    """Nothing is resized: of each side, what is more than a multiple of the patch is cut off at both ends."""
    tokenize("--native_size")
    rows, model = rows_of(), VQRAEModel.from_pretrained("model").eval()
    for row in rows:
        image = np.asarray(Image.open(work / "images" / row["key"]))
        height, width = image.shape[0] // 8, image.shape[1] // 8
        assert (row["height"], row["width"]) == (height, width)
        top, left = (image.shape[0] % 8) // 2, (image.shape[1] % 8) // 2
        pixels = torch.from_numpy(image[top : top + height * 8, left : left + width * 8].copy()).permute(2, 0, 1)
        with torch.no_grad():
            expected = model.get_image_tokens(pixels[None] / 255).flatten().tolist()
        assert row["image_tokens"] == expected
    assert len({(row["height"], row["width"]) for row in rows}) > 3


def test_mixed_sizes_are_tokenized_together_where_they_agree(work):
    batches = []

    def fake(pixels):
        batches.append(tuple(pixels.shape))
        return np.zeros((len(pixels), pixels.shape[2] // 8, pixels.shape[3] // 8), np.uint16)

    def images(sizes):
        return [{"image": {"bytes": None, "path": f"{size}.png"}} for size in sizes if made(size)]

    def made(size):
        Image.new("RGB", size).save(f"{size}.png")
        return True

    views = Views(8, None)
    collected = Collected(fake, views, 4 * 16 * 16, row_features(64))
    for _ in range(4):
        collected.add(prepare(images([(16, 16), (32, 16), (16, 16), (8, 8)]), views))
    rows = collected.finish()
    assert sorted(batches) == [(2, 3, 16, 32), (2, 3, 16, 32), (4, 3, 8, 8), (4, 3, 16, 16), (4, 3, 16, 16)]
    assert rows["width"].to_pylist() == [2, 4, 2, 1] * 4  # in the order of the images
    batches.clear()
    collected = Collected(fake, views, 4 * 16 * 16, row_features(64))
    for number in range(60):  # all of another size: not more wait than eight batches
        collected.add(prepare(images([(8, 8 * (number + 1))]), views))
        held = sum(len(rows) * h * w for (h, w), rows in collected._waiting.items())
        assert held <= MOST_BATCHES * 4 * 16 * 16


def test_a_tokenizer_of_the_other_kind_works_as_well(work):
    torch.manual_seed(0)
    model = SimVQGANModel(
        SimVQGANConfig(
            image_size=32,
            base_channels=32,
            channel_multiplier=[1, 1],
            latent_channels=8,
            num_res_blocks=1,
            codebook_size=32,
        )
    )
    model.save_pretrained("gan")
    tokenize("--model_name_or_path", "gan", "--max_samples", 2)
    with torch.no_grad():
        pixels = VQRAEImageProcessor.for_image_size(32)(
            Image.open("images/cats/01.png"), return_tensors="pt"
        ).pixel_values
        assert rows_of()[1]["image_tokens"] == model.eval().get_image_tokens(pixels).flatten().tolist()


def test_large_codebooks_get_four_bytes():
    assert token_dtype(2**16) is np.uint16 and token_dtype(2**16 + 1) is np.uint32
    values = pa.array([[70_000]], row_features(2**17).arrow_schema.field("image_tokens").type)
    assert values.to_pylist() == [[70_000]]


def test_what_bfloat16_changes_is_measured_on_the_first_batch(work, capsys):
    tokenize("--dtype", "bfloat16", "--batch_size", 5)
    exact = [alone(Image.open(path)).ravel() for path in sorted((work / "images").rglob("*.png"))]
    first = [row["image_tokens"] for row in rows_of()][:5]
    share = np.mean([np.array(tokens) != other for tokens, other in zip(first, exact)])
    assert Provenance.load("tokens").share_changed_by_dtype == share
    assert f"In bfloat16, {share:.2%} of the first batch's tokens differ" in capsys.readouterr().out
    assert Provenance.load("tokens").tokenizer_hash == tokenizer_hash(VQRAEModel.from_pretrained("model"))


def test_an_unreadable_image_is_named_and_has_no_row(work):
    """Also where a shard has no other."""
    for number in range(3):
        (work / "images" / "cats" / f"0{number}.png").write_bytes(b"no image")
    written = tokenize()
    done = Provenance.load("tokens")
    assert (done.num_images, done.num_unreadable, done.num_rows) == (14, 3, 11)
    lines = written["unreadable_images.txt"].decode().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["cats/00.png", "cats/01.png", "cats/02.png"]
    assert not any(str(work) in line for line in lines) and "cannot identify" in lines[0]
    assert [row["key"] for row in rows_of()][:2] == ["cats/03.png", "cats/04.png"]
    assert "; 3 could not be read" in written["README.md"].decode()


def test_images_of_which_none_can_be_read_are_an_error(work):
    for path in (work / "images").rglob("*.png"):
        path.write_bytes(b"no image")
    assert "No image of images can be read (14 tried); cats/00.png: " in tokenize(fails=True)


# The same callable elsewhere ----------------------------------------------------------------------------------------


def test_the_callable_works_in_map_as_it_is(work):
    """As arrow tables; the rows are those of the command."""
    tokenize()
    images = tokenize_images.open_images(tokenize_images.parser.parse_args(
        ["--model_name_or_path", "model", "--data", "images", "--output_dir", "x"]))  # fmt: skip
    rows = TokenRows("model", batch_size=4, label=images.features["label"])
    mapped = images.with_format("arrow").map(
        rows, batched=True, batch_size=5, remove_columns=images.column_names, features=rows.features
    )
    assert mapped.with_format(None).to_list() == rows_of()
    with pytest.raises(ValueError, match="batch must be an Arrow table, got dict"):
        rows({"image": []})


def documented(work) -> list[str]:
    """The code of the document, and what it stands on: a tokenizer, images, and their tokens."""
    (work / "checkpoints").mkdir()
    (work / "checkpoints" / "vqrae-dinov2-small").symlink_to(work / "model")
    (work / "my_images").symlink_to(work / "images")
    tokenize()
    return blocks("docs/tokenizing.md")


def test_the_code_of_the_document_runs(work):
    names = {}
    for code in documented(work)[:3]:
        exec(code, names)
    assert names["pixels"].shape == (1, 3, 32, 32)
    kept = "image_tokens", "crop", "flipped", "height", "width", "label"
    found, expected = ([{name: row[name] for name in kept} for row in rows] for rows in (names["mapped"], rows_of()))
    assert found == expected


def test_the_callable_works_on_two_workers_of_ray(work, monkeypatch):
    """The document's own job, on three files."""
    ray = pytest.importorskip("ray")
    code = documented(work)[3]
    images = datasets.load_dataset("imagefolder", data_dir="images", split="train", cache_dir="cache")
    (work / "image_parquet").mkdir()
    for part in range(3):
        images.shard(3, part).to_parquet(f"image_parquet/{part}.parquet")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ray.init(num_cpus=4, include_dashboard=False)  # two workers, and whoever reads and writes
    names = {}
    try:
        code = code.replace('"image_parquet"', '"image_parquet", override_num_blocks=3')  # small ones would be joined
        exec(code.replace('"checkpoints', f'"{work}/checkpoints'), names)
        assert names["workers"] == 2
        found = datasets.Dataset.from_parquet([str(path) for path in (work / "ray_tokens").iterdir()]).to_list()
    finally:
        ray.shutdown()
    assert sorted((row["image_tokens"], row["label"]) for row in found) == sorted(
        (row["image_tokens"], row["label"]) for row in rows_of()
    )


# Nothing lost, nothing twice ----------------------------------------------------------------------------------------


def interrupted(monkeypatch, after: int, *arguments):
    """A run that ends when it wants to write one more shard than `after`."""
    write, count = tokenize_images.write_shard, iter(range(after))

    def write_some(*given):
        if next(count, None) is None:
            raise OSError(errno.EIO, "the plug was pulled")
        write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_images, "write_shard", write_some)
        return tokenize(*arguments, fails=True)


@pytest.mark.parametrize("more", [(), ("--native_size",), ("--crops", "10")])
def test_a_run_that_goes_on_ends_with_the_bytes_of_the_uninterrupted_one(work, monkeypatch, more):
    whole = tokenize(*more, output="whole/tokens")
    interrupted(monkeypatch, 2, *more)
    assert sorted(files()) == ["provenance.json", "train-00000.parquet", "train-00001.parquet"]
    assert not Provenance.load("tokens").finished
    os.remove("tokens/train-00000.parquet")  # as if another process had been to write it
    assert tokenize(*more, workers=1) == whole
    assert tokenize(*more) == whole  # nothing is left to do


def test_a_damaged_shard_is_written_again(work):
    whole = tokenize()
    with open("tokens/train-00002.parquet", "r+b") as file:
        file.truncate(100)
    assert tokenize() == whole


def test_the_bar_ends_where_it_said(work, capsys):
    """Also where a shard is left that is not full."""
    tokenize()
    os.remove("tokens/train-00004.parquet")
    capsys.readouterr()
    tokenize()
    said = capsys.readouterr().err
    assert " 0/2 " in said and " 2/2 " in said and " 0/3 " not in said


def stream(monkeypatch):
    """The images as a stream, which is not known to end."""
    opened = tokenize_images.open_images

    def generate(args):
        images = opened(args)
        return datasets.IterableDataset.from_generator(lambda: iter(images), features=images.features)

    monkeypatch.setattr(tokenize_images, "open_images", generate)


def shards(written: dict) -> dict:
    return {name: content for name, content in written.items() if name.endswith(".parquet")}


@pytest.mark.parametrize("shard_size", [3, 7])  # the last shard is full with the latter
def test_a_stream_gives_the_same_shards_also_when_interrupted(work, monkeypatch, shard_size):
    size = "--shard_size", shard_size
    whole = shards(tokenize(*size, output="whole/tokens"))
    stream(monkeypatch)
    interrupted(monkeypatch, 1, *size)
    assert shards(tokenize(*size)) == whole
    os.remove("tokens/train-00001.parquet")
    assert shards(tokenize(*size, workers=1)) == whole
    assert Provenance.load("tokens").num_images == 14
    assert len(shards(tokenize("--max_samples", 4, output="few/tokens"))) == 2


def test_captions_come_along_also_where_a_stream_does_not_tell_of_them(work, monkeypatch):
    images = [{"image": {"path": f"images/cats/0{number}.png", "bytes": None}, "text": "Käfer"} for number in (0, 1)]
    unknown = datasets.IterableDataset.from_generator(lambda: iter(images))
    assert unknown.features is None
    monkeypatch.setattr(tokenize_images, "open_images", lambda args: unknown)
    tokenize()
    assert [row["text"] for row in rows_of()] == ["Käfer"] * 2


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("is_stream", [False, True])
def test_any_number_of_processes_reads_every_image_once(processes, is_stream):
    for length in (1, 6, 7, 20):
        source = datasets.Dataset.from_dict({"image": list(range(length))})
        source = source.to_iterable_dataset() if is_stream else source
        read = {}
        for rank in range(processes):
            for shard, items in Plan(source, 3, 2, lambda shard, rank=rank: shard % processes == rank):
                assert shard % processes == rank and len(items) <= 2
                read.setdefault(shard, []).extend(item["image"] if is_stream else item for item in items)
        assert read == {shard: list(range(length))[3 * shard : 3 * shard + 3] for shard in range(-(-length // 3))}


def start(*arguments, launcher=(), **options):
    command = [sys.executable, *launcher, "-m", "generation.tokenize_images", "--model_name_or_path", "model"]
    command += ["--data", "images", "--output_dir", "tokens", "--batch_size", "4", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_write_what_one_writes(work):
    """Also where one has begun."""
    whole = tokenize(output="whole/tokens")
    tokenize()
    for name in ("train-00001.parquet", "train-00002.parquet", "train-00004.parquet", "README.md"):
        os.remove(f"tokens/{name}")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = start("--shard_size", "3", "--num_workers", "0", launcher=launcher)
    said, _ = done.communicate(timeout=120)
    assert done.returncode == 0, said
    assert files() == whole
    assert json.loads((work / "tokens" / "run.json").read_text())["processes"] == 2
    assert "Tokenizing (one of 2 processes)" in said


def test_a_killed_run_goes_on_where_it_was(work):
    for number in range(150):
        os.link("images/dogs/13.png", f"images/dogs/x{number:03d}.png")
    size = "--shard_size", "1", "--num_workers", "0"
    process, end = start(*size), time.monotonic() + 120
    while len(list((work / "tokens").glob("train-*.parquet"))) < 3 and time.monotonic() < end:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    killed = files()
    assert 3 <= len(shards(killed)) < 164 and "README.md" not in killed
    assert tokenize(*size) == tokenize(*size, output="whole/tokens")


def test_a_full_disk_ends_in_one_line_and_leaves_no_half_shard(work):
    """The limit of a file's size stands for it: the system's error, in the middle of a shard."""
    model, limits = tokenize_images.TokenRows, resource.getrlimit(resource.RLIMIT_FSIZE)

    def with_little_space(*arguments, **options):
        rows = model(*arguments, **options)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_images, "TokenRows", with_little_space)
        try:
            said = tokenize(fails=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = [line for line in said.splitlines() if "error" in line]
    assert len(line) == 1 and line[0].startswith("tokenize_images.py: error: ") and "large" in line[0], said
    assert sorted(files()) == ["provenance.json"]
    assert tokenize() == tokenize(output="whole/tokens")


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, changed",
    [
        (("--flip",), "flip was False and is now True"),
        (("--image_size", "24"), "image_size was 32 and is now 24"),
        (("--shard_size", "4"), "shard_size was 3 and is now 4"),
        (("--max_samples", "3"), "max_samples was None and is now 3"),
    ],
)
def test_other_settings_are_refused_and_named(work, monkeypatch, more, changed):
    interrupted(monkeypatch, 1)
    assert changed in tokenize(*more, fails=True)


def test_another_tokenizer_and_other_images_are_refused_and_named(work, monkeypatch):
    interrupted(monkeypatch, 1)
    before = Provenance.load("tokens")
    Image.new("RGB", (20, 20)).save("images/dogs/20.png")
    assert f"source_hash was {before.source_hash} and is now" in tokenize(fails=True)
    torch.manual_seed(1)
    model = VQRAEModel(tiny_config())
    model.save_pretrained("model")
    said = tokenize(fails=True)
    assert f"tokenizer_hash was {before.tokenizer_hash} and is now {tokenizer_hash(model)}" in said
    with pytest.raises(ValueError) as error:
        check_tokenizer(model, before.tokenizer_hash, "tokens/")
    assert before.tokenizer_hash in str(error.value) and tokenizer_hash(model) in str(error.value)


def test_a_moved_source_and_a_renamed_tokenizer_are_the_same(work, monkeypatch):
    interrupted(monkeypatch, 1)
    os.rename("images", "elsewhere")
    os.rename("model", "tokenizer")
    tokenize("--data", "elsewhere", "--model_name_or_path", "tokenizer")


def test_a_folder_of_something_else_is_left_alone(work):
    os.mkdir("tokens")
    pq.write_table(pa.table({"a": [1]}), "tokens/train-00000.parquet")
    assert "parquet files and no provenance.json" in tokenize(fails=True)
    assert os.listdir("tokens") == ["train-00000.parquet"]


@pytest.mark.parametrize(
    "more, message",
    [
        (("--data", "no/where/at all"), "does not exist"),
        (("--model_name_or_path", "nowhere"), "There is no folder nowhere here, and no model"),
        (("--model_name_or_path", "images"), "images cannot be loaded"),
        (("--image_size", "20"), "multiple of the tokenizer's patch, 8 px"),
        (("--native_size", "--image_size", "32"), "no effect beside native_size"),
        (("--split", "[:3]"), "must begin with the name of a split"),
        (("--private",), "no effect without --push_to_hub"),
        (("--crops", "10", "--ten_crop_ratio", "0"), "ten_crop_ratio must be at least 1"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(work, more, message):
    said = tokenize(*more, fails=True)
    lines = [line for line in said.splitlines() if "error: " in line]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in said
    assert not os.path.exists("tokens")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_size": 20}, "must be a positive multiple of the tokenizer's patch, 8 px"),
        ({"image_size": 16, "crops": 3}, "crops must be 1 or 10"),
        ({"image_size": None, "crops": 10, "ten_crop_ratio": 1.1}, "in their own sizes"),
        ({"image_size": 16, "ten_crop_ratio": 1.1}, "ten_crop_ratio has no effect"),
        ({"image_size": 16, "crops": 10, "flip": True, "ten_crop_ratio": 1.1}, "flip has no effect"),
        ({"image_size": 16, "crops": 10, "ten_crop_ratio": 0.9}, "at least 1"),
    ],
)
def test_views_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Views(8, **arguments)


# The card and the hub -----------------------------------------------------------------------------------------------


def test_the_card_says_how_it_was_made(work):
    written = tokenize("--crops", 10)
    card = DatasetCard(written["README.md"].decode())
    assert card.data.configs == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "train-*.parquet"}]}
    ]
    assert card.data.size_categories == ["n<1K"]
    assert str(work) not in card.content and Provenance.load("tokens").tokenizer_hash in card.text
    assert "shorter side 35 px, ten crops of 32 px" in card.text
    with Image.open("tokens/decoded.png") as picture:
        assert picture.size == (2 + 8 * 34, 2 + 2 * 34)
    decoded = decode_image({"path": "tokens/decoded.png", "bytes": None}).crop((2, 2, 34, 34))
    model, row = VQRAEModel.from_pretrained("model").eval(), rows_of()[0]
    with torch.no_grad():
        pixels = model.decode(torch.tensor(row["image_tokens"]).view(1, 4, 4)).decoded_pixel_values[0]
    expected = (pixels.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(decoded) - expected).max() <= 1
