"""Every kind of source gives the same images, labels and captions; and each use of images takes every kind."""

import io
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image
from test_docs import blocks

import train_hf
from eval import probe, reference_statistics
from generation import tokenize_images
from modeling_simvq import VQRAEModel
from reading.images import decode_image, image_name
from reading.sources import find_source, is_on_hub, is_path, load_images, open_source, public_name
from train_hf import DataArguments, load_data
from training.options import refuse_without_effect, rules_of_data


COUNT = 12  # of images; the colour of each tells its number


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (20 * number, 0, 255 - 20 * number)).save(file, "PNG")
    return file.getvalue()


def class_of(number: int) -> str:
    return "blue" if number < COUNT // 2 else "red"


def caption_of(number: int) -> str:
    return f"picture {number}"


def numbers_of(dataset) -> list[int]:
    return [decode_image(record["image"]).getpixel((0, 0))[0] // 20 for record in dataset]


def write_tar(file: Path, numbers, captions_in: str = "txt") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for number in numbers:
            fields = {"png": encoded(number), "cls": str(int(class_of(number) == "red")).encode()}
            if captions_in == "txt":
                fields["txt"] = caption_of(number).encode()
            else:
                fields = {"png": fields["png"]}
                fields["json"] = json.dumps({"caption": caption_of(number), "label": class_of(number)}).encode()
            for suffix, content in fields.items():
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def table(numbers) -> datasets.Dataset:
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["blue", "red"]),
        "text": datasets.Value("string"),
    }
    columns = {
        "image": [{"bytes": encoded(i), "path": f"{i}.png"} for i in numbers],
        "label": [class_of(i) for i in numbers],
        "text": [caption_of(i) for i in numbers],
    }
    columns["label"] = [features["label"].str2int(name) for name in columns["label"]]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_folder(folder: Path) -> None:
    for number in range(COUNT):
        file = folder / class_of(number) / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(number))


def write_zip(file: Path, numbers, top: str = "") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        for number in numbers:
            archive.writestr(f"{top}{class_of(number)}/{number:04d}.png", encoded(number))
        archive.writestr("__MACOSX/._0000.png", b"the Finder's")


def make(kind: str, tmp_path: Path) -> str:
    """A source of `COUNT` images of that kind; its name."""
    halves = range(COUNT // 2), range(COUNT // 2, COUNT)
    if kind == "folder":
        write_folder(tmp_path / "data")
    elif kind == "list":
        write_folder(tmp_path / "images")
        files = [str(file) for file in sorted((tmp_path / "images").rglob("*.png"))]
        (tmp_path / "list.txt").write_text("\n".join(files))
        return str(tmp_path / "list.txt")
    elif kind == "zip":
        write_zip(tmp_path / "data.zip", range(COUNT), top="pictures/")
        return str(tmp_path / "data.zip")
    elif kind == "folder of zips":
        for i, numbers in enumerate(halves):
            write_zip(tmp_path / "data" / f"{i}.zip", numbers)
    elif kind == "parquet":
        table(range(COUNT)).to_parquet(tmp_path / "data.parquet")
        return str(tmp_path / "data.parquet")
    elif kind in ("folder of parquet", "glob of parquet"):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "README.md").write_text("# Images\n")
        for i, numbers in enumerate(halves):
            table(numbers).to_parquet(tmp_path / "data" / f"part-{i}.parquet")
        return str(tmp_path / "data" / "*.parquet") if kind.startswith("glob") else str(tmp_path / "data")
    elif kind == "tar":
        write_tar(tmp_path / "data.tar", range(COUNT))
        return str(tmp_path / "data.tar")
    elif kind in ("folder of tars", "braces of tars", "tars with json"):
        for i, numbers in enumerate(halves):
            write_tar(tmp_path / "data" / f"{i + 9:03d}.tar", numbers, "json" if "json" in kind else "txt")
        return str(tmp_path / "data" / "{009..010}.tar") if kind.startswith("braces") else str(tmp_path / "data")
    elif kind == "saved":
        table(range(COUNT)).save_to_disk(tmp_path / "data")
    return str(tmp_path / "data")


FILES = ["folder", "list", "zip", "folder of zips"]
TABLES = ["parquet", "folder of parquet", "glob of parquet", "saved"]
TARS = ["tar", "folder of tars", "braces of tars", "tars with json"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", FILES + TABLES + TARS)
def test_every_kind_of_source_gives_images_labels_and_captions(kind, streaming, tmp_path, capsys):
    dataset = open_source(make(kind, tmp_path), streaming=streaming)
    assert isinstance(dataset, datasets.IterableDataset) == streaming
    assert dataset.features["image"] == datasets.Image(decode=False)
    rows = list(dataset)
    assert sorted(numbers_of(rows)) == list(range(COUNT))
    assert len({image_name(row["image"]) for row in rows}) == COUNT
    assert not any(str(tmp_path) in image_name(row["image"]) for row in rows if kind != "list")
    numbers = numbers_of(rows)
    if kind != "list":
        labels = dataset.features["label"]
        if kind in ("folder", "zip", "folder of zips", *TABLES):
            assert labels == datasets.ClassLabel(names=["blue", "red"])
        if kind == "tars with json" and not streaming:
            assert labels == datasets.ClassLabel(names=["blue", "red"])
        expected = [class_of(n) if labels.dtype == "string" else int(class_of(n) == "red") for n in numbers]
        assert [row["label"] for row in rows] == expected
    if kind in TABLES + TARS:
        assert [row["text"] for row in rows] == [caption_of(n) for n in numbers]
    said = capsys.readouterr().out
    if kind == "tars with json":
        assert "images from 'png', labels from 'json.label', captions from 'json.caption'" in said
    elif kind in TARS:
        assert "images from 'png', labels from 'cls', captions from 'txt'" in said


def test_columns_of_any_name_are_taken_where_they_are_named(tmp_path):
    rows = table(range(COUNT)).rename_columns({"image": "after", "label": "kind", "text": "title"})
    before = table(range(COUNT)).select_columns("image").rename_column("image", "before")
    rows = datasets.concatenate_datasets([rows, before], axis=1).add_column("area", [1.5] * COUNT)
    rows.save_to_disk(tmp_path / "data")
    name = str(tmp_path / "data")
    with pytest.raises(ValueError, match="several columns of images, after, before: --image_column"):
        open_source(name)
    taken = open_source(name, image_column="after", text_column="title")  # the only one of its type is found
    assert taken.column_names == ["image", "label", "text"]
    assert taken["label"][0] == 0 and taken["text"][0] == caption_of(0)
    assert load_images(name, image_column="before").column_names == ["image"]
    for column, message in (("nothing", "no column 'nothing', only"), ("area", "'area' of .* holds no labels")):
        with pytest.raises(ValueError, match=message):
            open_source(name, image_column="after", label_column=column)
    with pytest.raises(ValueError, match="must be different columns"):
        open_source(name, image_column="after", label_column="title", text_column="title")


def test_bytes_without_a_type_are_images_by_their_usual_names(tmp_path):
    data = {"img": [encoded(3)], "class_name": ["red"], "caption": ["a"]}
    datasets.Dataset.from_dict(data).to_parquet(tmp_path / "a.parquet")
    for streaming in (False, True):
        (row,) = open_source(tmp_path / "a.parquet", streaming=streaming)
        assert numbers_of([row]) == [3] and row["text"] == "a" and row["label"] == ("red" if streaming else 0)


def test_images_beside_folders_of_classes_have_no_label(tmp_path):
    write_folder(tmp_path / "data")
    (tmp_path / "data" / "0000.png").write_bytes(encoded(0))
    assert sorted(map(str, open_source(tmp_path / "data")["label"])) == ["0"] * 6 + ["1"] * 6 + ["None"]


def test_splits_are_told_from_names_of_files(tmp_path):
    for split, numbers in (("train", range(8)), ("validation", range(8, COUNT))):
        (tmp_path / "data").mkdir(exist_ok=True)
        table(numbers).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    datasets.DatasetDict(train=table(range(8)), validation=table(range(8, COUNT))).save_to_disk(tmp_path / "saved")
    for name in ("data", "saved"):
        assert find_source(tmp_path / name).has_splits
        assert numbers_of(load_images(tmp_path / name, "validation")) == [8, 9, 10, 11]
        with pytest.raises(ValueError, match="no split 'test', only train, validation"):
            load_images(tmp_path / name, "test")
        with pytest.raises(ValueError, match=r"no split 'train\[:3\]'"):
            load_images(tmp_path / name, "train[:3]")
        train, held_out = load_data(DataArguments(str(tmp_path / name)), *run_options(tmp_path))
        assert (len(train), len(held_out)) == (8, 4)


def test_a_zip_that_changed_is_unpacked_again(tmp_path):
    write_zip(tmp_path / "a.zip", [1, 11])
    assert numbers_of(load_images(tmp_path / "a.zip")) == [1, 11]
    write_zip(tmp_path / "a.zip", [2, 3, 11])
    assert numbers_of(load_images(tmp_path / "a.zip")) == [2, 3, 11]


def test_images_of_the_same_name_in_two_zips_have_different_names(tmp_path):
    """One and the same key in a dataset of tokens would make one image of two."""
    write_zip(tmp_path / "data" / "a.zip", [1, 11])
    with zipfile.ZipFile(tmp_path / "data" / "b.zip", "w") as archive:
        archive.writestr("blue/0001.png", encoded(5))
    rows = list(open_source(tmp_path / "data"))
    assert [image_name(row["image"]) for row in rows] == [
        "a.zip/blue/0001.png",
        "a.zip/red/0011.png",
        "b.zip/blue/0001.png",
    ]
    assert numbers_of(rows) == [1, 11, 5] and [row["label"] for row in rows] == [0, 1, 0]


def test_a_list_is_in_utf_8_and_may_begin_with_its_mark(tmp_path):
    (tmp_path / "blühend 1.png").write_bytes(encoded(3))
    written = f"{tmp_path / 'blühend 1.png'}\n"
    (tmp_path / "list.txt").write_text(written, "utf-8-sig")
    assert numbers_of(open_source(tmp_path / "list.txt")) == [3]
    (tmp_path / "list.txt").write_text(written, "latin-1")
    with pytest.raises(ValueError, match=r"list.txt is not in UTF-8 \(.*\): save it so"):
        open_source(tmp_path / "list.txt")


def test_a_file_whose_name_is_not_in_utf_8_is_named(tmp_path):
    (tmp_path / os.fsdecode(b"bl\xfchend.png")).write_bytes(encoded(3))
    with pytest.raises(ValueError, match=r"bl.udcfchend.png' is not in UTF-8: rename it"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "name, is_a_path, public",
    [
        ("org/images", False, "org/images"),
        ("nobody/{000..012}.tar", True, "{000..012}.tar"),
        ("/home/me/gone/*.parquet", True, "*.parquet"),
        ("/home/me/gone", True, "gone"),
        (".", True, None),
        ("https://host/data.tar", False, "https://host/data.tar"),
        ('{"codebook_size": 64}', False, '{"codebook_size": 64}'),
    ],
)
def test_of_a_path_others_read_the_last_part_alone(name, is_a_path, public, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_path(name) == is_a_path and public_name(name) == (public or tmp_path.name)
    assert is_on_hub(name) == (name == "org/images")


@pytest.mark.parametrize(
    "make_it, message",
    [
        (lambda f: (write_tar(f / "a.tar", [1]), write_folder(f)), "several kinds, 1 .tar and 12 images"),
        (lambda f: (f / "provenance.json").write_text("{}") and table([1]).to_parquet(f / "a.parquet"), "of tokens"),
        (lambda f: datasets.Dataset.from_dict({"image_tokens": [[1]]}).to_parquet(f / "a.parquet"), "of tokens"),
        (lambda f: datasets.Dataset.from_dict({"x": [1]}).to_parquet(f / "a.parquet"), "no column of images, only x"),
        (lambda f: (f / "a.zip").write_bytes(b"PK"), "a.zip cannot be unpacked"),
        (lambda f: (f / "notes.md").touch(), "No images in"),
    ],
    ids=["mixed", "provenance", "tokens", "no images", "damaged zip", "nothing"],
)
def test_what_cannot_be_a_source_is_named(make_it, message, tmp_path):
    (tmp_path / "data").mkdir()
    make_it(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "data")


@pytest.mark.parametrize("name", ["{000..003}.tar", "*.tar", "none.parquet", "a.csv"])
def test_files_that_are_not_there_are_named(name, tmp_path):
    write_tar(tmp_path / "sub" / "000.tar", [1])
    with pytest.raises(ValueError, match="does not exist: name a folder of images"):
        find_source(tmp_path / name)
    with pytest.raises(ValueError, match="001.tar does not exist"):
        find_source(tmp_path / "sub" / "{000..003}.tar")


# What takes them ------------------------------------------------------------------------------------------------------


def run_options(tmp_path, seed=0):
    return SimpleNamespace(output_dir=str(tmp_path / "out"), process_index=0, seed=seed), tmp_path / "skipped.txt"


def test_a_part_of_rows_is_held_out_and_told(tmp_path, capsys):
    parts = load_data(DataArguments(make("tar", tmp_path), holdout=0.25), *run_options(tmp_path))
    train, held_out = map(numbers_of, parts)
    assert held_out == [0, 4, 8] and sorted(train + held_out) == list(range(COUNT))
    assert "9 rows" in (said := capsys.readouterr().out) and "3 held out" in said


def test_a_part_of_a_zip_is_held_out_by_files(tmp_path):
    arguments = DataArguments(make("folder of zips", tmp_path), holdout=0.5)
    train, held_out = map(numbers_of, load_data(arguments, *run_options(tmp_path)))
    assert len(held_out) == 6 and sorted(train + held_out) == list(range(COUNT))
    assert len((tmp_path / "out" / "heldout_images.txt").read_text().split()) == 6


@pytest.mark.parametrize(
    "kind, option, because",
    [
        ("tar", {"group_separator": "-"}, "group_separator has no effect: .* not files of images"),
        ("parquet", {"train_split": "all"}, "train_split has no effect: .* has no splits"),
        ("saved", {"streaming": True}, "streaming has no effect: .* read as it is used anyway"),
        ("zip", {"image_column": "png"}, "image_column has no effect: .* files of images"),
        ("saved", {"dataset_revision": "v1"}, "dataset_revision has no effect: .* not a dataset of the hub"),
    ],
)
def test_options_without_effect_on_a_source_are_named(kind, option, because, tmp_path):
    data = DataArguments(make(kind, tmp_path), **option)
    with pytest.raises(ValueError, match=because):
        refuse_without_effect(option, set(option), rules_of_data(data))
    known = DataArguments(data.train_data, image_column="png", streaming=True, holdout=0.2)
    given = {"image_column": "png", "streaming": True, "holdout": 0.2}
    if kind == "tar":
        refuse_without_effect(given, set(given), rules_of_data(known))


def test_a_stream_of_tars_is_shuffled_and_its_buffer_told(tmp_path, capsys):
    name = make("folder of tars", tmp_path)
    with pytest.raises(ValueError, match="--streaming needs --eval_data"):
        load_data(DataArguments(name, streaming=True), *run_options(tmp_path))
    arguments = DataArguments(name, eval_data=name, streaming=True, shuffle_buffer=50)
    train, held_out = load_data(arguments, *run_options(tmp_path))
    assert sorted(order := numbers_of(train)) == numbers_of(held_out) != order
    assert "a buffer of 50 (--shuffle_buffer)" in capsys.readouterr().out


def test_training_runs_on_tars_and_starts_its_codes_there(tmp_path, monkeypatch):
    for number in (0, 1):
        write_tar(tmp_path / "tars" / f"{number}.tar", range(6 * number, 6 * number + 6))
    table([2, 9]).to_parquet(tmp_path / "eval.parquet")
    VQRAEModel(tiny_config()).save_pretrained(tmp_path / "model")
    config = tiny_config(codebook_size=8).to_dict()
    fields = ("encoder_config", "image_size", "decoder_patch_size", "codebook_size", "decoder_num_hidden_layers")
    config = {name: config[name] for name in fields} | {"codebook_init": "kmeans"}
    options = {
        "train_data": tmp_path / "tars",
        "eval_data": tmp_path / "eval.parquet",
        "output_dir": tmp_path / "out",
        "model_config": json.dumps(config),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "lpips_weight": 0,
        "report_to": "none",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train_hf.py", *flags, "--streaming", "--use_cpu"])
    train_hf.main()
    model = VQRAEModel.from_pretrained(tmp_path / "out")
    assert model.config.codebook_init_latents
    assert "eval_loss" in json.loads((tmp_path / "out" / "all_results.json").read_text())


def test_evaluation_reads_a_zip_and_parquet_files_as_it_reads_a_folder(tmp_path, command, saved_model):
    sources = [make("folder", tmp_path / "one"), make("zip", tmp_path / "two"), make("parquet", tmp_path)]
    flags = ["--model_name_or_path", tmp_path / "model", "--network_metrics", "--image_size", 32]
    results = []
    for number, name in enumerate(sources):
        command(*flags, "--data", name, "--output_dir", tmp_path / f"results-{number}")
        results.append(json.loads((tmp_path / f"results-{number}" / "results.json").read_text()))
    assert results[0]["metrics"]["psnr"] == results[1]["metrics"]["psnr"] == results[2]["metrics"]["psnr"]
    assert [result["data"]["split"] for result in results] == [None, None, "train"]
    assert [result["num_images"] for result in results] == [COUNT] * 3


def test_reference_statistics_take_parquet_files(tmp_path, monkeypatch, inception_weights):
    table([1, 11]).to_parquet(tmp_path / "a.parquet")
    flags = ["--data", tmp_path / "a.parquet", "--image_size", 32, "--inception_weights", inception_weights]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, flags), "--output_file", str(tmp_path / "a.npz")])
    reference_statistics.main()
    assert np.load(tmp_path / "a.npz")["mu"].shape == (2048,)


@pytest.mark.parametrize("kind", ["folder", "zip", "saved", "tar", "tars with json"])
def test_probe_takes_classes_of_any_source(kind, tmp_path):
    name = make(kind, tmp_path)
    images, labels, names = probe.labelled_images(name)
    assert names == (["0", "1"] if kind == "tar" else ["blue", "red"])
    assert labels.tolist() == [0] * 6 + [1] * 6
    assert [class_of(number) == "red" for number in numbers_of(images)] == labels.astype(bool).tolist()
    images, labels, chosen = probe.labelled_images(name, names[::-1])
    assert (
        chosen == names[::-1]
        and [class_of(number) == "blue" for number in numbers_of(images)] == [False] * 6 + [True] * 6
    )


def test_classes_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="has no classes: put the images"):
        probe.labelled_images(make("list", tmp_path))
    write_folder(tmp_path / "data")
    with pytest.raises(ValueError, match="no class 'green', only blue, red"):
        probe.labelled_images(str(tmp_path / "data"), ["blue", "green"])


def test_the_snippet_of_the_document_runs(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "my_images")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("docs/data.md")
    exec(code, {})
    assert capsys.readouterr().out.strip().endswith("['image', 'label'] Image(mode=None, decode=False)")


@pytest.mark.parametrize("kind", ["zip", "braces of tars", "folder of parquet", "saved"])
def test_tokenizing_takes_every_kind_with_labels_and_captions(kind, tmp_path, monkeypatch):
    VQRAEModel(tiny_config()).save_pretrained(tmp_path / "model")
    flags = ["--model_name_or_path", tmp_path / "model", "--data", make(kind, tmp_path), "--num_workers", 0]
    monkeypatch.setattr(sys, "argv", ["tokenize_images.py", *map(str, [*flags, "--output_dir", tmp_path / "tokens"])])
    tokenize_images.main()
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "tokens" / "*.parquet"), split="train")
    assert len(rows) == COUNT
    assert rows["label"] == [int(class_of(number) == "red") for number in range(COUNT)]
    if kind != "zip":
        assert rows["text"] == [caption_of(number) for number in range(COUNT)]
