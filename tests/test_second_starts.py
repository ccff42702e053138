"""A command that is given again, and an --output_dir that already holds a run of some kind."""

import json
import shlex
import sys

import pytest
import torch
from conftest import encoder_config
from generators import TINY, run_training, write_tokens
from test_training import make_trainer

import train_hf
from eval import reconstruction
from eval.commands import ends_in_one_line
from eval.seen_images import seen_images
from modeling_simvq import VQRAEModel
from training.card import Provenance, write_recipe
from training.resuming import refuse_another_run


FIELDS = {"encoder_config": encoder_config(), "decoder_patch_size": 8, "codebook_size": 64, "image_size": 32}


def train(monkeypatch, tmp_path, *flags, config=FIELDS) -> None:
    """train_hf.py, in this process, on a tiny model; `config` is `None` where `flags` name another."""
    options = "--max_steps 2 --save_steps 1 --per_device_train_batch_size 4 --lpips_weight 0 --use_cpu --report_to none"
    options = ["--train_data", tmp_path / "images", "--output_dir", tmp_path / "out", *options.split()]
    if config is not None:
        options += ["--codebook_init", "gaussian", "--model_config", json.dumps(config)]
    monkeypatch.setattr(sys, "argv", ["train_hf.py", *map(str, [*options, *flags])])
    train_hf.main()


def contents(folder) -> dict:
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def test_a_finished_run_says_so_and_stays_as_it_is(tmp_path, image_folder, monkeypatch, capsys):
    train(monkeypatch, tmp_path)
    before = contents(tmp_path / "out")
    capsys.readouterr()
    train(monkeypatch, tmp_path, "--learning_rate", "0.5")
    said = capsys.readouterr().out
    assert contents(tmp_path / "out") == before
    (line,) = [line for line in said.splitlines() if "is finished" in line]
    assert f"{tmp_path / 'out'} is finished (step 2 of 2)" in line
    assert "--max_steps" in line and "another --output_dir" in line and "Resuming" not in said
    assert "pushed" not in line
    train(monkeypatch, tmp_path, "--push_to_hub", "--hub_model_id", "me/tokenizer")
    assert f"Nothing is pushed now: `hf upload me/tokenizer {tmp_path / 'out'} --exclude" in capsys.readouterr().out
    train(monkeypatch, tmp_path, "--max_steps", "3")
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 3


def test_epochs_are_finished_too(tmp_path, image_folder, monkeypatch, capsys):
    flags = ["--max_steps", "-1", "--num_train_epochs", "1"]
    train(monkeypatch, tmp_path, *flags)
    before = contents(tmp_path / "out")
    train(monkeypatch, tmp_path, *flags)
    assert contents(tmp_path / "out") == before and "--num_train_epochs" in capsys.readouterr().out


def test_a_run_that_was_killed_behind_its_last_step_is_completed(tmp_path, image_folder, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("train_hf.write_report", kill)
        train(patch, tmp_path)
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    train(monkeypatch, tmp_path)
    assert (tmp_path / "out" / "training_report.html").exists()
    # also one that went on behind a finished one
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("train_hf.write_report", kill)
        train(patch, tmp_path, "--max_steps", "3")
    (tmp_path / "out" / "training_report.html").unlink()
    train(monkeypatch, tmp_path, "--max_steps", "3")
    assert (tmp_path / "out" / "training_report.html").exists()


@pytest.mark.parametrize(
    "change, flags, different",
    [
        ({"decoder_hidden_size": 64}, [], "decoder_hidden_size: 32 there, 64 now"),
        ({"encoder_config": encoder_config(num_hidden_layers=1)}, [], "encoder_config.num_hidden_layers: 2 there, 1"),
        ({}, ["--stage", "2"], "freeze_encoder (--stage): True there, False now"),
        (None, ["--model_name_or_path", "other"], "model_name_or_path: None there, other now"),
    ],
)
def test_a_folder_with_another_run_is_named(change, flags, different, tmp_path, image_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(monkeypatch, tmp_path, "--max_steps", "1")
    before = contents(tmp_path / "out")
    if change is None:
        VQRAEModel(train_hf.VQRAEConfig(**FIELDS)).save_pretrained("other")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train(monkeypatch, tmp_path, *flags, config=None if change is None else {**FIELDS, **change})
    said = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in said if "error: " in line]) == 1 and different in said[-1], said
    assert f"{tmp_path / 'out'} holds" in said[-1] and "another --output_dir" in said[-1]
    assert f"--model_name_or_path {tmp_path / 'out'}" in said[-1]
    assert contents(tmp_path / "out") == before


def test_a_checkpoint_whose_optimizer_does_not_fit_is_named(tmp_path, image_folder, monkeypatch, capsys):
    train(monkeypatch, tmp_path, "--max_steps", "1")
    with pytest.raises(SystemExit):
        last = tmp_path / "out" / "checkpoint-1"  # named, so that what is in the folder is not asked
        train(monkeypatch, tmp_path, "--stage", "2", "--distillation_weight", "0", "--resume_from_checkpoint", last)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{last} is of another kind of run" in error and "another --output_dir" in error


def test_another_optimizer_in_mid_run_is_named(tmp_path, image_folder, monkeypatch, capsys):
    train(monkeypatch, tmp_path, "--max_steps", "1")
    with pytest.raises(SystemExit):
        train(monkeypatch, tmp_path, "--optim", "adafactor")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint-1 has the state of another optimizer, without" in error and "give the --optim" in error


@pytest.fixture
def tokens(tmp_path):
    generator = torch.Generator().manual_seed(0)
    content = torch.randint(0, 16, (20, 1, 2, 3), generator=generator)
    return write_tokens(tmp_path / "tokens", content, labels=[i % 4 for i in range(20)])


SAVED = "--max_steps 2 --save_strategy steps --save_steps 1 --holdout 0.1".split()


def test_a_finished_generator_says_so_and_stays_as_it_is(tmp_path, tokens, monkeypatch, capsys):
    command = ["--train_data", tokens, *SAVED, "--output_dir", tmp_path / "out"]
    run_training(monkeypatch, *command)
    before = contents(tmp_path / "out")
    run_training(monkeypatch, *command)
    assert contents(tmp_path / "out") == before
    assert f"{tmp_path / 'out'} is finished (step 2 of 2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, different",
    [
        (["--model_config", TINY.replace("64", "32")], "hidden_size: 64 there, 32 now"),
        (["--condition", "none"], "condition: class there, none now"),
    ],
)
def test_a_folder_with_another_generator_is_named(flags, different, tmp_path, tokens, monkeypatch, capsys):
    command = ["--train_data", tokens, *SAVED, "--output_dir", tmp_path / "out"]
    run_training(monkeypatch, *command)
    before = contents(tmp_path / "out")
    with pytest.raises(SystemExit), ends_in_one_line():
        run_training(monkeypatch, *command, *flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert different in error and f"{tmp_path / 'out'} holds" in error and "another --output_dir" in error
    assert contents(tmp_path / "out") == before


# What a run says -----------------------------------------------------------------------------------------------------


def test_the_command_that_measures_a_run_is_said_and_runs(tmp_path, image_folder, monkeypatch, capsys):
    train(monkeypatch, tmp_path, "--max_steps", "1")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python -m eval")]
    _, _, module, *flags = shlex.split(line)
    assert module == "eval.reconstruction"
    monkeypatch.setattr(sys, "argv", ["reconstruction.py", *flags, "--network_metrics"])
    reconstruction.main()
    result = json.loads((tmp_path / "out" / "evaluation" / "results.json").read_text())
    assert result["num_images"] == len((tmp_path / "out" / "heldout_images.txt").read_text().split())
    assert "was trained" not in capsys.readouterr().out
    flags[flags.index("--data") + 1] = str(tmp_path / "images")
    monkeypatch.setattr(sys, "argv", ["reconstruction.py", *flags, "--network_metrics"])
    reconstruction.main()
    assert f"11 of the 12 images lie in {tmp_path / 'images'}, on which" in capsys.readouterr().out


def test_data_that_was_named_for_evaluation_is_in_the_command(tmp_path, image_folder):
    held_out = tmp_path / "my others"
    image_folder.rename(held_out)
    args = train_hf.DataArguments(train_data="org/images", eval_data=str(held_out))
    assert f"--data '{held_out}' --output_dir" in train_hf.evaluation_command(args, "out")
    args = train_hf.DataArguments(train_data="org/images", dataset_config_name="full", eval_split="test")
    expected = "--data org/images --split test --dataset_config_name full --output_dir out/evaluation"
    assert expected in train_hf.evaluation_command(args, "out")


@pytest.mark.parametrize("options, said", [({}, None), ({"gan_weight": 0.1}, "eval_loss lacks gan, which loss has")])
def test_losses_that_cannot_be_compared_are_told(tmp_path, image_folder, tiny_model, options, said):
    told = make_trainer(tiny_model, image_folder, tmp_path / "out", **options).loss_beside_eval_loss()
    assert told is None if said is None else said in told


def test_nothing_is_said_of_images_that_nobody_knows(tmp_path, image_folder):
    files = sorted(image_folder.iterdir())
    assert seen_images("org/model", files) is None
    (tmp_path / "training_recipe.json").write_text(json.dumps({"train_data": "images"}))
    assert seen_images(tmp_path, files) is None  # no list of what was held out
    (tmp_path / "heldout_images.txt").write_text(f"{files[0].resolve()}\n")
    assert seen_images(tmp_path, files[:1]) is None
    assert "11 of the 12 images" in seen_images(tmp_path, files)
    (tmp_path / "training_recipe.json").write_text(json.dumps({"train_data": "list.txt"}))
    assert seen_images(tmp_path, files) is None


def test_a_tokenizer_that_is_named_by_a_dot_is_the_same_again(tmp_path, monkeypatch):
    model = VQRAEModel(train_hf.VQRAEConfig(**FIELDS))
    model.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "trainer_state.json").write_text("{}")
    given = {"model_name_or_path": "."}
    monkeypatch.chdir(tmp_path)
    write_recipe(Provenance(recipe=given), tmp_path / "out")
    refuse_another_run(tmp_path / "out", model.config, given)
    with pytest.raises(ValueError, match="model_name_or_path: .* there, other now"):
        refuse_another_run(tmp_path / "out", model.config, {"model_name_or_path": "other"})
