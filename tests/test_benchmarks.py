"""That the benchmarks start, and what is theirs alone."""

import json
import os
import runpy
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_loading import ROOT

from benchmarks import evaluation, generation, tokenize
from benchmarks.collapse import keep_apart
from generation.tokenizing import TokenRows
from reading.files import dataset_of_files, find_images


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py")))
def test_each_starts_as_a_module(name, monkeypatch, capsys):
    if name == "triton_search":
        pytest.importorskip("triton", reason="Triton comes with torch's builds for CUDA")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert end.value.code == 0 and "usage: " in capsys.readouterr().out


def test_runs_of_other_settings_are_not_taken_for_one_s_own(tmp_path):
    """An interrupted benchmark goes on with the runs of its folder, which are found by their names alone."""
    inputs = {"settings": {"steps": 5}, "encoder": "dinov2", "data": ["photos"]}
    for _ in range(2):
        keep_apart(inputs, tmp_path / "out" / "inputs.json")
    for name, value in (("settings", {"steps": 6}), ("encoder", "mae"), ("data", ["emoji"])):
        with pytest.raises(ValueError, match=f"has runs of other {name}: choose another --output_dir"):
            keep_apart(inputs | {name: value}, tmp_path / "out" / "inputs.json")
    assert os.listdir(tmp_path / "out") == ["inputs.json"]
    assert json.loads((tmp_path / "out" / "inputs.json").read_text()) == inputs


def test_the_evaluation_s_loop_and_the_references_give_the_same_numbers(image_folder, capsys):
    """The benchmark checks it."""
    evaluation.without_networks(find_images(image_folder)[:3])
    assert "| ours |" in capsys.readouterr().out


def test_the_loops_of_generation_draw_codes_and_ours_those_of_the_loop_without_a_cache():
    """With and without guidance; how fast they are is for the benchmark to say."""
    model, vocabulary = generation.random_generator(side=3, codes=32, width=64, layers=1)
    for guidance_scale in (1.0, 1.5):
        loops = generation.Loops(model, vocabulary, 3, guidance_scale)
        result, different = generation.compare(loops, repeats=1)
        assert different == 0 and {"bare", "ours", "llamagen", "no_cache"} <= result.keys()
        assert guidance_scale == 1 or (loops.two() == loops.ours()).all()
        tokens = loops.llamagen()
        assert tokens.shape == (3, 9) and 0 <= tokens.min() and tokens.max() < 32
    assert "| ours (generate) |" in generation.table(result, 3)


def test_the_ways_of_tokenizing_write_the_same_tokens(saved_model, image_folder, tmp_path):
    rows, records = TokenRows(str(tmp_path / "model"), batch_size=4), dataset_of_files(find_images(image_folder))
    given = ["--model_name_or_path", "model", "--output_dir", "out", "--batch_size", "4", "--num_workers", "0"]
    args = tokenize.parser.parse_args([*given, "--shard_size", "12"])
    for way in (tokenize.ours, tokenize.as_llamagen, tokenize.as_rar):
        (tmp_path / way.__name__).mkdir()
        way(rows, records, tmp_path / way.__name__, args)
    ours = pq.read_table(tmp_path / "ours" / "train-00000.parquet")["image_tokens"].to_pylist()
    codes = [np.load(tmp_path / "as_llamagen" / "codes" / f"{number}.npy").ravel().tolist() for number in range(12)]
    lines = (tmp_path / "as_rar" / "pretokenized.jsonl").read_text().splitlines()
    assert ours == codes == [json.loads(line)["tokens"] for line in lines]
