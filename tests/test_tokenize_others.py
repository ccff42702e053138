"""What is done with a dataset of tokens: looked at, exported, pushed."""

import json
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_config
from hub import TOKEN, LocalHub
from PIL import Image
from test_tokenize import rows_of, tokenize

from generation import export_tokens, tokenize_images, tokens_info
from generation.provenance import Provenance
from modeling_simvq import VQRAEModel
from reading.models import tokenizer_hash


def call(command, *arguments, capsys=None, fails=False):
    """Runs a command of generation/; gives what it prints, or with `fails` what it says."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command.__name__, *map(str, arguments)])
        if not fails:
            command.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as end:
            command.main()
        assert end.value.code
        return capsys.readouterr().err


# Looked at ----------------------------------------------------------------------------------------------------------


def test_info_counts_what_is_there(work, capsys):
    tokenize("--flip")
    said = call(tokens_info, "tokens", capsys=capsys)
    tokens = np.concatenate([row["image_tokens"] for row in rows_of()])
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    for text in (
        "images       14, 0 of them unreadable",
        "rows         28 in 5 shards",
        "grids        4 x 4 (28 rows)",
        f"tokens       {len(tokens):,}",
        f"codes used   {len(shares)} of 64 ({len(shares) / 64:.1%})",
        f"perplexity   {2 ** -(shares * np.log2(shares)).sum():.1f}",
        "tokens a second (1 x cpu)",
    ):
        assert text in said


def test_info_draws_rows_by_their_own_tokenizer_alone(work, capsys):
    tokenize("--native_size")
    call(tokens_info, "tokens", "--decode", 14, "--output_file", "rows.png", capsys=capsys)
    with Image.open("rows.png") as picture:  # places of 40 x 24 px for the largest
        assert picture.size == (2 + 8 * 42, 2 + 2 * 26)
    torch.manual_seed(1)
    other = VQRAEModel(tiny_config())
    other.save_pretrained("other")
    said = call(tokens_info, "tokens", "--decode", 4, "--model_name_or_path", "other", capsys=capsys, fails=True)
    assert tokenizer_hash(other) in said and Provenance.load("tokens").tokenizer_hash in said
    other = VQRAEModel.from_pretrained("model")
    other.decoder.decoder_pred.weight.data.zero_()  # what paints has no part in it
    other.save_pretrained("other")
    call(tokens_info, "tokens", "--decode", 4, "--model_name_or_path", "other", capsys=capsys)


def rewritten(shard: str, **columns) -> None:
    """A shard with other columns."""
    table = pq.read_table(shard)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name).with_type(values.type), values)
    pq.write_table(table, shard)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda rows: {"image_tokens": pa.array([[64] * 16] * len(rows), pa.list_(pa.uint16()))}, "has the token 64"),
        (lambda rows: {"image_tokens": pa.array([[1] * 16] * len(rows), pa.list_(pa.int64()))}, "tokens of int64"),
        (lambda rows: {"width": pa.array([3] * len(rows), pa.int32())}, "not height times width"),
    ],
)
def test_info_finds_what_is_not_as_the_provenance_says(work, capsys, damage, message):
    tokenize()
    rewritten("tokens/train-00003.parquet", **damage(pq.read_table("tokens/train-00003.parquet")))
    said = call(tokens_info, "tokens", capsys=capsys, fails=True)
    assert "train-00003.parquet" in said and message in said


def test_info_misses_shards_and_images_and_finds_strays(work, capsys):
    tokenize()
    shard = work / "tokens" / "train-00004.parquet"
    content = shard.read_bytes()
    shard.unlink()
    assert "train-00004.parquet is missing" in call(tokens_info, "tokens", capsys=capsys, fails=True)
    shard.write_bytes((work / "tokens" / "train-00003.parquet").read_bytes())
    assert "have 15 images, the provenance tells of 14" in call(tokens_info, "tokens", capsys=capsys, fails=True)
    shard.write_bytes(content)
    (work / "tokens" / "train-00005.parquet").write_bytes(content)
    assert "train-00005.parquet is none of the 5" in call(tokens_info, "tokens", capsys=capsys, fails=True)
    (work / "tokens" / "train-00005.parquet").unlink()
    call(tokens_info, "tokens", capsys=capsys)
    done = Provenance.load("tokens")
    done.num_images = done.num_rows = done.num_unreadable = None
    done.save("tokens")
    assert "not finished" in call(tokens_info, "tokens", capsys=capsys, fails=True)
    assert "no provenance.json" in call(tokens_info, "model", capsys=capsys, fails=True)


# Exported -----------------------------------------------------------------------------------------------------------


def test_llamagen_reads_what_is_exported_for_it(work, capsys):
    """As its `CustomDataset` does: files by number, all views in one, one of them drawn where "flip" is in the path."""
    tokenize("--crops", 10)
    said = call(export_tokens, "tokens", "--format", "llamagen", "--output_dir", "codes_flip", capsys=capsys)
    assert "rename" not in said
    rows = rows_of()
    for number in range(14):
        features = np.load(work / "codes_flip" / "imagenet32_codes" / f"{number}.npy")
        labels = np.load(work / "codes_flip" / "imagenet32_labels" / f"{number}.npy")
        assert (features.shape, features.dtype, labels.shape, labels.dtype) == ((1, 10, 16), np.int64, (1,), np.int64)
        for view in range(10):
            drawn = torch.from_numpy(features[:, view])
            assert drawn.reshape(1, -1)[0].tolist() == rows[10 * number + view]["image_tokens"]
        assert torch.from_numpy(labels).item() == rows[10 * number]["label"]
    assert len(list((work / "codes_flip" / "imagenet32_codes").iterdir())) == 14
    arguments = "tokens", "--format", "llamagen", "--name", "cats", "--output_dir", "codes"
    assert "rename" in call(export_tokens, *arguments, capsys=capsys)
    assert (work / "codes" / "cats32_labels" / "13.npy").is_file()
    assert "is not empty" in call(export_tokens, *arguments, capsys=capsys, fails=True)


def test_rar_reads_what_is_exported_for_it(work, capsys):
    """As its `PretoeknizedDataSetJSONL` does, a line at a time."""
    tokenize("--flip")
    call(export_tokens, "tokens", "--format", "rar", "--output_dir", "rar", capsys=capsys)
    lines = [json.loads(line) for line in (work / "rar" / "pretokenized.jsonl").open()]
    assert [(torch.tensor(line["class_id"]).item(), torch.tensor(line["tokens"]).tolist()) for line in lines] == [
        (row["label"], row["image_tokens"]) for row in rows_of()
    ]


def test_labels_may_be_numbers_of_any_width(work, capsys):
    tokenize("--max_samples", 2)
    shard, done = work / "tokens" / "train-00000.parquet", Provenance.load("tokens")
    rows = pq.read_table(shard)
    pq.write_table(rows.set_column(rows.column_names.index("label"), "label", pa.array([0, 200], "uint8")), shard)
    call(export_tokens, "tokens", "--format", "rar", "--output_dir", "rar", capsys=capsys)
    lines = (work / "rar" / "pretokenized.jsonl").read_text().splitlines()
    assert [json.loads(line)["class_id"] for line in lines] == [0, 200] and done.num_rows == 2


@pytest.mark.parametrize("form", ["llamagen", "rar"])
def test_what_these_formats_cannot_hold_is_refused(work, capsys, form):
    where = "--format", form, "--output_dir", "out"
    tokenize("--native_size", output="native")
    assert "in their own sizes" in call(export_tokens, "native", *where, capsys=capsys, fails=True)
    tokenize("--data", "images/cats", output="plain")
    assert "no labels" in call(export_tokens, "plain", *where, capsys=capsys, fails=True)
    assert not list((work / "out").rglob("*.*") if (work / "out").exists() else [])


# Pushed -------------------------------------------------------------------------------------------------------------


def test_a_pushed_dataset_has_all_but_paths_of_this_machine(work, monkeypatch):
    arguments = "--push_to_hub", "me/tokens", "--private", "--revision", "v1", "--token", TOKEN
    (work / "images" / "cats" / "02.png").write_bytes(b"no image")
    with LocalHub() as hub:
        monkeypatch.setattr(tokenize_images.HfApi, "__init__", _with_endpoint(tokenize_images.HfApi, hub.url))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        local = tokenize("--data", work / "images", "--model_name_or_path", work / "model", *arguments)
        assert not hub.unknown and hub.private == {"me/tokens"}
        there = hub.files("me/tokens", "v1")
    there.pop(".gitattributes", None)
    assert there.keys() == local.keys()
    different = {name for name in local if there[name] != local[name]}
    assert different == {"README.md", "provenance.json"}
    assert not any(str(work).encode() in content for content in there.values())
    assert 'load_dataset("me/tokens", split="train")' in there["README.md"].decode()
    for name, content in there.items():
        path = work / "pushed" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert Provenance.load("pushed").num_rows == 13
    assert len(datasets.load_dataset("pushed", split="train", cache_dir="cache")) == 13


def _with_endpoint(api, url):
    begin = api.__init__

    def __init__(self, *arguments, **options):
        begin(self, *arguments, **{**options, "endpoint": url})

    return __init__
