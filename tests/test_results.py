"""What an evaluation leaves: pictures, tables, comparisons."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_config
from hub import LocalHub
from huggingface_hub import ModelCard
from PIL import Image
from test_loading import run

from eval import compare
from eval.pictures import save_rows
from eval.results import choose
from modeling_simvq import VQRAEModel


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


# The model card ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, image_folder):
    """A hub with a model on main, another on the branch `larger`, both with a card, and one without on `bare`."""
    with LocalHub() as hub:
        hub.commits["user/model"], hub.branches["user/model"] = [], {}
        for number, branch in enumerate(("main", "larger", "bare")):
            torch.manual_seed(number)
            VQRAEModel(tiny_config()).save_pretrained(tmp_path / branch)
            if branch != "bare":
                (tmp_path / branch / "README.md").write_text(f"---\nlicense: mit\n---\n# That of {branch}\n")
            hub._commit("user/model", branch, {x.name: x.read_bytes() for x in (tmp_path / branch).iterdir()})
        yield hub
    assert not hub.unknown


def evaluate_with_card(hub, tmp_path, *options) -> dict:
    command = ["-m", "eval.reconstruction", "--model_name_or_path", "user/model", "--data", "images", "--output_dir"]
    command += ["out", "--network_metrics", "--update_model_card", *options]
    run(command, tmp_path, **hub.environment, HF_HOME=str(tmp_path / "home"))
    return json.loads((tmp_path / "out" / "results.json").read_text())


def numbers_of(card: bytes) -> dict[str, float]:
    return {entry.metric_type: entry.metric_value for entry in ModelCard(card.decode()).data.eval_results or []}


def test_numbers_go_into_the_card_of_the_branch_that_was_measured(hub, tmp_path):
    main, larger = (hub.files("user/model", branch) for branch in ("main", "larger"))
    result = evaluate_with_card(hub, tmp_path, "--revision", "larger")
    card = hub.files("user/model", "larger")["README.md"]
    assert numbers_of(card)["psnr"] == result["metrics"]["psnr"] and "# That of larger" in card.decode()
    assert hub.files("user/model") == main
    assert hub.files("user/model", "larger") == larger | {"README.md": card}
    result = evaluate_with_card(hub, tmp_path)
    card = hub.files("user/model")["README.md"]
    assert numbers_of(card)["psnr"] == result["metrics"]["psnr"] and "# That of main" in card.decode()


def test_a_card_that_cannot_be_written_is_told_before_anything_is_measured(hub, tmp_path):
    commit = hub.branches["user/model"]["larger"]  # a tag is no branch either
    for revision, message in (
        (commit, f"--revision {commit} is none of user/model, which has main, larger, bare"),
        ("bare", "user/model has no README.md at bare"),
    ):
        with pytest.raises(AssertionError) as error:
            evaluate_with_card(hub, tmp_path, "--revision", revision)
        lines = [line.strip() for line in str(error.value).splitlines()]
        said = [line for line in lines if line.startswith("reconstruction.py: error: ")]
        assert len(said) == 1 and message in said[0] and "Traceback" not in str(error.value)
    assert len(hub.commits["user/model"]) == 3 and not (tmp_path / "out").exists()
