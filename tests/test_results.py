"""What an evaluation leaves: pictures, tables, comparisons."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from eval import compare
from eval.pictures import save_rows
from eval.results import choose


def test_pictures_are_chosen_by_rank_and_none_twice():
    scores = [float(x) for x in np.random.default_rng(0).permutation(100)]
    chosen = choose(scores, best_first=True)
    assert [scores[i] for i in chosen["best"]] == [99, 98, 97, 96, 95, 94, 93, 92]
    assert [scores[i] for i in chosen["worst"]] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert [scores[i] for i in chosen["median"]] == [53, 52, 51, 50, 49, 48, 47, 46]
    assert [scores[i] for i in choose(scores, best_first=False)["best"]] == [0, 1, 2, 3, 4, 5, 6, 7]
    for count in range(1, 12):
        places = [i for group in choose(scores[:count], True).values() for i in group]
        assert len(places) == len(set(places))


def test_pictures_show_originals_above_reconstructions(tmp_path):
    save_rows([torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8) / 2], tmp_path / "a" / "p.png", columns=2)
    picture = np.asarray(Image.open(tmp_path / "a" / "p.png"))
    assert [picture[2 + 10 * row + 4, 6, 0] for row in range(4)] == [0, 128, 0, 128]
    assert picture[36, 16, 0] == 255
    assert os.listdir(tmp_path / "a") == ["p.png"]


def test_what_a_protocol_measures_besides_does_not_keep_results_apart(command, tmp_path, image_folder):
    """Such as a result of the time before blocking was measured."""
    for name in "ab":
        command("--callable", "torch:clone", "--data", image_folder, "--network_metrics", "--image_size", 32,
                "--output_dir", name)  # fmt: skip
    new, old = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ab")
    for field in ("blocking", "flat_colours", "semantic_agreement", "ms_ssim"):
        del old["protocol"][field]
    assert not compare.differences(new, old) and not compare.differences(old, new)
    old["protocol"]["ssim"] = "uniform"
    assert "differ in ssim (gaussian / uniform)" in compare.differences(new, old)[0]


def test_results_are_compared_only_under_one_protocol(command, tmp_path, image_folder, monkeypatch, capsys):
    options = ["--callable", "torch:clone", "--data", image_folder, "--network_metrics"]
    for name, extra in (
        ("a", ["--image_size", 32]),
        ("b", ["--image_size", 32, "--batch_size", 3]),
        ("c", ["--protocol", "rae-256"]),
    ):
        command(*options, *extra, "--output_dir", name)
    files = {name: str(tmp_path / name / "results.json") for name in "abc"}

    def compared(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
        compare.main()

    compared(files["a"], files["b"])
    assert "| SSIM | 1 | 1 (+0) |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="Not compared"):
        compared(files["a"], files["c"])
    error = capsys.readouterr().err
    assert "default and rae-256 differ in image_size (None / 256)" in error and "images of 32 and 256 px" in error
    compared(str(tmp_path / "a"), files["c"], "--allow_differences")  # a folder does as well
    output = capsys.readouterr().out
    assert "| SSIM |" in output and "- not comparable: " in output
