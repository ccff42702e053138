"""That the benchmarks start, and what is theirs alone."""

import io
import itertools
import json
import os
import re
import runpy
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_config
from test_loading import ROOT

from benchmarks import evaluation, generation, measuring, quantizer, tokenize, training_step
from benchmarks.collapse import keep_apart
from benchmarks.measuring import OTHERS, kind_of
from generation.tokenizing import TokenRows
from modeling_simvq import VQRAEModel
from reading.files import dataset_of_files, find_images


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    "name", sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py") if "__main__" in file.read_text())
)
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
    evaluation.without_networks(find_images(image_folder)[:3], 0, torch.device("cpu"))
    assert "| ours |" in capsys.readouterr().out


def test_a_whole_evaluation_is_told_apart_into_its_parts(image_folder, monkeypatch, capsys):
    """Also under the profiler, where Inception and VGG are convolutions. Both networks are made smaller."""
    small = {"rfid": torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), torch.nn.Flatten())}

    def convolution(net):
        return lambda fake, real, normalize: torch.nn.functional.conv2d(fake - real, torch.ones(1, 3, 5, 5)).mean(
            (1, 2, 3)
        )

    networks = evaluation.Networks({"rfid": lambda images: small["rfid"](images.float())})
    networks.lpips = {f"lpips_{net}": convolution(net) for net in ("alex", "vgg")}
    monkeypatch.setattr(evaluation, "networks_of_default", lambda device: networks)
    monkeypatch.setattr(evaluation, "model_of", lambda *sizes: VQRAEModel(tiny_config(codebook_size=1024)).eval())
    given = ["--data", str(image_folder), "--image_size", "32", "--batch_size", "4", "--profile"]
    evaluation.whole_pass(find_images(image_folder)[:8], evaluation.parser.parse_args(given))
    printed = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"\| [\d.]+ \| ([\d.]+)% \|", printed.split("| all |")[0])]
    assert len(shares) == 6 and sum(shares) == pytest.approx(100, abs=0.5)
    assert re.search(r"[\d.]+ images a second, at most [\d,]+ MB", printed)
    assert re.search(r"\| convolutions \| 0\.0*[1-9]", printed) and "Outside matrix products" in printed


TINY_STEP = ["--batch_size", "2", "--image_size", "32", "--width", "64", "--layers", "1", "--codes", "64"]


def test_a_training_step_of_ours_begins_at_the_references_loss():
    args = training_step.parser.parse_args([*TINY_STEP, "--steps", "1"])
    ours, references = (training_step.steps_of(kind, args) for kind in ("ours", "references"))
    assert ours["first loss"] == pytest.approx(references["first loss"], rel=1e-5)
    assert len(ours["seconds"]) == 1 and ours["waited"][0] < ours["seconds"][0] and ours["peak"] > 100


def test_a_training_step_is_measured_on_images_in_bf16_and_told_apart(image_folder):
    given = [*TINY_STEP, "--bf16", "--data", str(image_folder), "--steps", "1"]
    args = training_step.parser.parse_args(given)
    measured = training_step.steps_of("ours", args)
    assert 0 < min(measured["waited"]) and all(w < s for w, s in zip(measured["waited"], measured["seconds"]))
    profile = training_step.profile_of_a_step(args)
    assert sum(profile.kinds.values()) == pytest.approx(profile.seconds, rel=0.02)
    assert all(profile.kinds[kind] > 0 for kind in ("matrix products", "convolutions", "attention"))
    assert 0 < profile.outside < 1 and "| matrix products |" in profile.table()
    assert "bounds the step: waiting for images (waiting for images 99.0%" in training_step.bound(0.99, profile)
    assert "bounds the step: waiting" not in training_step.bound(0.0, profile)


def test_operations_are_products_or_not_by_their_names():
    kinds = {"aten::addmm": "matrix products", "aten::cudnn_convolution": "convolutions", "aten::add_": OTHERS[0]}
    kinds |= {"aten::_efficient_attention_backward": "attention", "simvq::nearest_codes": "the search's kernel"}
    kinds |= {"autograd::engine::evaluate_function: MulBackward0": OTHERS[1], "Optimizer.step#AdamW.step": OTHERS[1]}
    assert {name: kind_of(name) for name in kinds} == kinds


def test_workers_of_the_quantizer_s_benchmark_read_the_one_clock(monkeypatch, capsys):
    ticks = itertools.count()

    def clock(device: torch.device) -> float:
        assert device.type == "cpu"
        return next(ticks)

    monkeypatch.setattr(measuring, "now", clock)
    monkeypatch.setattr(quantizer, "peak_above_baseline", lambda step, device: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    quantizer.worker({"method": "ours", "mode": "step", "tokens": 8, "codes": 16, "dim": 4, "device": "cpu"})
    printed = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert printed == [{"peak": None, "process": None}, {"seconds": 1.0}, {"seconds": 1.0}]


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
