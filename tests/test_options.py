"""Options of train_hf.py: those that would have no effect are refused, and what was given is remembered."""

import dataclasses
import importlib
import json
import re
import shlex
import sys

import pytest
from test_docs import blocks
from test_loading import ROOT
from test_recipes import RECIPES

import generation.train
import train_hf
from eval.commands import CommandParser
from training.arguments import CommonTrainingArguments
from training.options import (
    parse,
    refuse_without_effect,
    rules_of_data,
    rules_of_encoder,
    rules_of_model,
    rules_of_training,
)


KINDS = train_hf.ModelArguments, train_hf.DataArguments, train_hf.VQRAETrainingArguments
HUB = ["--encoder_name_or_path", "org/encoder", "--train_data", "org/images", "--use_cpu", "--report_to", "none"]
LOCAL = [*HUB, "--train_data", "."]


def rules(model, data, training, frozen=True):
    return [*rules_of_model(model), *rules_of_data(data), *rules_of_training(training), *rules_of_encoder(frozen)]


def check(*arguments, frozen=True) -> dict:
    """The options that were given; raises for those that would have no effect."""
    (model, data, training), given, by_flags = parse(KINDS, list(arguments), "")
    refuse_without_effect(given, by_flags, rules(model, data, training, frozen))
    return given


@pytest.mark.parametrize(
    "arguments, ignored, because",
    [
        ([*LOCAL, "--eval_data", ".", "--holdout", "0.2"], "holdout", "--eval_data names"),
        ([*LOCAL, "--eval_data=.", "--group-separator=-"], "group_separator", "--eval_data names"),
        ([*HUB, "--holdout", "0.2"], "holdout", "a split to hold out"),
        ([*LOCAL, "--streaming", "--max_steps", "2"], "streaming", "on this disk"),
        ([*LOCAL, "--train_split", "train"], "train_split", "on this disk"),
        ([*HUB, "--eval_data", ".", "--eval_split", "test"], "eval_split", "on this disk"),
        ([*LOCAL, "--image_column", "picture"], "image_column", "on this disk"),
        ([*LOCAL, "--dataset_config_name", "full"], "dataset_config_name", "on this disk"),
        ([*HUB, "--shuffle_buffer", "9"], "shuffle_buffer", "--streaming"),
        ([*HUB, "--encoder_name_or_path", ".", "--revision", "v1"], "revision", "not of the hub"),
        (
            [*HUB[2:], "--model_name_or_path", "org/model", "--codebook_init", "kmeans"],
            "codebook_init",
            "the codes are",
        ),
        ([*HUB, "--model_config", '{"use_simvq": false}', "--codebook_init", "kmeans"], "codebook_init", "decides"),
        ([*HUB, "--discriminator_learning_rate", "1e-4"], "discriminator_learning_rate", "no GAN"),
        ([*HUB, "--gan_adaptive"], "gan_adaptive", "no GAN"),
        ([*HUB, "--lecam_weight", "0.1"], "lecam_weight", "no GAN"),
        ([*HUB, "--gan_weight", "1", "--discriminator_cutout", "0.1"], "discriminator_cutout", "_augment"),
        ([*HUB, "--gan_weight", "1", "--discriminator_name_or_path", "x"], "discriminator_name_or_path", "patchgan"),
        ([*HUB, "--gan_weight", "1", "--discriminator_warmup_steps", "5"], "discriminator_warmup_steps", "no warm-up"),
        ([*HUB, "--lr_scheduler_type", "constant", "--warmup_steps", "5"], "warmup_steps", "no warm-up"),
        ([*HUB, "--lpips_weight", "0", "--lpips_network", "alex"], "lpips_network", "LPIPS is off"),
        ([*HUB, "--lpips_weight", "0", "--perceptual_optional"], "perceptual_optional", "ConvNeXt-S are off"),
        ([*LOCAL, "--token_passes", "2", "--quantizer_lr_multiplier", "2"], "quantizer_lr_multiplier", "not trained"),
        ([*LOCAL, "--max_steps", "2", "--num_train_epochs", "2"], "num_train_epochs", "--max_steps decides"),
        ([*LOCAL, "--eval_steps", "2"], "eval_steps", "--eval_strategy is no"),
        ([*LOCAL, "--save_strategy", "epoch", "--save_steps", "2"], "save_steps", "--save_strategy is epoch"),
        ([*LOCAL, "--hub_model_id", "me/model"], "hub_model_id", "nothing is pushed"),
        ([*LOCAL, "--do_predict"], "do_predict", "trains, and then evaluates"),
        ([*LOCAL, "--distillation_weight", "1"], "distillation_weight", "the encoder is frozen"),
        ([*LOCAL, "--encoder_learning_rate", "1"], "encoder_learning_rate", "the encoder is frozen"),
    ],
    ids=lambda value: value if isinstance(value, str) and "_" in value else "",
)
def test_an_option_without_effect_is_an_error_that_says_why(arguments, ignored, because):
    with pytest.raises(ValueError) as error:
        check(*arguments)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"--{ignored} has no effect: ") and because in line


def test_a_flag_may_take_the_effect_from_what_a_file_says(tmp_path):
    """But not the file from itself, nor from a flag."""
    recipe = tmp_path / "recipe.json"
    options = {"encoder_name_or_path": "org/encoder", "train_data": ".", "holdout": 0.2, "gan_weight": 0.1}
    options |= {"lecam_weight": 0.1, "discriminator_augment": True, "use_cpu": True, "report_to": ["none"]}
    recipe.write_text(json.dumps(options))
    check(str(recipe))
    check(str(recipe), "--gan_weight", "0", "--eval_data", ".")
    with pytest.raises(ValueError, match="--gan_start_step has no effect"):
        check(str(recipe), "--gan_weight", "0", "--gan_start_step", "5")
    recipe.write_text(json.dumps(options | {"eval_data": "."}))
    with pytest.raises(ValueError, match="--holdout has no effect"):
        check(str(recipe))


def test_what_is_off_asks_for_nothing():
    check(*LOCAL, "--lecam_weight", "0", "--gan_adaptive", "false", "--streaming", "false", "--warmup_steps", "0")


def test_rules_name_options_that_there_are():
    (model, data, training), _, _ = parse(KINDS, LOCAL, "")
    known = {name for options in (model, data, training) for name in vars(options)}
    for rule in rules(model, data, training):
        assert {*rule.names.split(), *rule.of.split()} <= known, rule


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_have_no_option_without_effect(recipe, tmp_path, monkeypatch):
    options = json.loads(recipe.read_text())
    monkeypatch.chdir(tmp_path)
    if "holdout" in options:  # from a folder, which is there
        (tmp_path / options.get("train_data", "my_images")).mkdir(parents=True)
        (tmp_path / options.get("train_data", "my_images") / "a.png").touch()
    extra = [] if "train_data" in options else ["--train_data", "."]
    if not options.keys() & {"encoder_name_or_path", "model_name_or_path"} and "encoder_config" not in str(options):
        extra += ["--encoder_name_or_path", "org/encoder"]
    frozen = options.get("stage") != 2 and options.get("model_config", {}).get("freeze_encoder", True)
    check(str(recipe), *extra, "--bf16", "false", "--use_cpu", "--report_to", "none", frozen=frozen)


def documented():
    for document in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
        text = "\n".join(blocks(document.relative_to(ROOT), "bash")).replace("\\\n", " ")
        for line in text.splitlines():
            if "train_hf.py" in line and "$" not in line and "..." not in line:
                yield pytest.param(line.partition("train_hf.py")[2], id=f"{document.name}: {line.strip()[:60]}")


@pytest.mark.parametrize("command", list(documented()))
def test_documented_commands_have_no_option_without_effect(command):
    arguments = shlex.split(command)
    off = ["--bf16", "false", "--use_cpu", "--report_to", "none"]
    check(*arguments, *off, frozen="stage2" not in command and "--stage 2" not in command)


def documented_modules():
    """Commands that are modules with a parser of their own."""
    for document in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
        text = "\n".join(blocks(document.relative_to(ROOT), "bash")).replace("\\\n", " ")
        for module, arguments in re.findall(r"-m ((?:generation|benchmarks|examples|eval|convert)\.\w+) (.*)", text):
            if "..." not in arguments and "$" not in arguments:
                yield pytest.param(module, arguments, id=f"{document.name}: {module} {arguments.strip()[-30:]}")


@pytest.mark.parametrize("module, arguments", list(documented_modules()))
def test_documented_options_of_modules_are_there(module, arguments):
    parser = getattr(importlib.import_module(module), "parser", None)
    if parser is not None:  # others make theirs when they are called
        parser.parse_args(shlex.split(arguments.replace("--device cuda", "--device cpu")))  # which is there


def test_what_was_given_is_remembered_whatever_its_form():
    given = check(*LOCAL, "--seed=7", "--max-steps", "3", "--no_dataloader_pin_memory", "--gan_adaptive", "0")
    expected = {"seed": 7, "max_steps": 3, "dataloader_pin_memory": False, "gan_adaptive": False}
    assert {name: given[name] for name in expected} == expected and len(given) == 8


def test_numbers_of_a_json_file_stay_numbers(tmp_path):
    """Also those in fields of fields, and such as 1e-5, which YAML takes for a text."""
    options = {"lr_scheduler_kwargs": {"min_lr": 1e-05}, "model_config": {"decoder_layer_norm_eps": 1e-12}}
    (tmp_path / "recipe.json").write_text(json.dumps(options).replace("1e-05", "1e-5"))
    arguments = [str(tmp_path / "recipe.json"), "--train_data", ".", "--output_dir", str(tmp_path)]
    (_, _, training), given, _ = parse(KINDS, arguments, "")
    assert given["model_config"] == {"decoder_layer_norm_eps": 1e-12}
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_a_value_in_a_file_may_begin_with_a_dash(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"group_separator": "-crop", "max_steps": -1, "bf16": False}))
    (_, data, training), given, _ = parse(KINDS, [str(tmp_path / "recipe.json"), *LOCAL], "")
    assert data.group_separator == given["group_separator"] == "-crop"
    assert (training.max_steps, training.bf16) == (given["max_steps"], given["bf16"]) == (-1, False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["broken.json"], "broken.json is no JSON"),
        (["list.yaml"], "list.yaml holds no fields with names"),
        ([*LOCAL, "--max_step", "3"], "there is no option --max_step: did you mean --max_steps?"),
        (["--train-dat", "."], "there is no option --train-dat: did you mean --train_data?"),  # before what is missing
        (["misspelt.json", *LOCAL], "misspelt.json: there is no option --max_step: did you mean --max_steps?"),
        ([*LOCAL, "--sunshine"], "there is no option --sunshine: see --help."),
        ([*LOCAL, "--gan_generator_loss", "hing"], "got 'hing': did you mean hinge?"),
        ([*LOCAL, "--model_config", "{"], "model_config must be JSON"),
        ([*LOCAL, "--model_config", "5"], "model_config must have fields with names, got 5"),
        ([*LOCAL, "--learning_rate", "fast"], "invalid float value"),
        ([*LOCAL, "--lr_scheduler_type", "cosine_with_min_lr", "--eval_strategy", "now"], "now"),
        ([*HUB, "--streaming"], "--streaming needs --max_steps"),
        ([*LOCAL, "--encoder_name_or_path", "nowhere/at-all"], "nowhere/at-all"),
        ([*LOCAL, "--encoder_name_or_path", "empty"], "empty"),
        (["--model_config", '{"codebook_size": -1}', *LOCAL[2:]], "codebook_size"),
        (["--model_config", '{"colour": 1}', *LOCAL[2:]], "colour"),
        (["--model_config", '{"codebook_sise": 1}', *LOCAL[2:]], "no codebook_sise: did you mean codebook_size?"),
    ],
)
def test_mistakes_end_the_script_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{]")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "misspelt.json").write_text('{"_source": "ours", "max_step": 3}')
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["train_hf.py", *arguments])
    with pytest.raises(SystemExit) as end:
        train_hf.main()
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code in (1, 2)
    assert said[-1].startswith("train_hf.py: error: ") and message in said[-1], said
    assert not any("Traceback" in line for line in said)


@pytest.mark.parametrize("arguments", [["--modell", "x"], ["--model", "x", "--kind=round"], ["--kind", "round"]])
def test_options_and_values_that_are_nearly_right_are_named(arguments, capsys):
    """In every command, in one line, and before what is missing is."""
    parser = CommandParser("What it does.")
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--kind", choices=("square", "rounded"))
    with pytest.raises(SystemExit) as end:
        parser.parse_args(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    meant = "there is no option --modell" if "--modell" in arguments else "did you mean rounded?"
    assert end.value.code == 2 and "error: " in line and meant in line


def test_values_that_look_like_options_and_beginnings_of_names_are_understood():
    parser = CommandParser("What it does.")
    parser.add_argument("--model_name_or_path")
    parser.add_argument("rest", nargs="*")
    args = parser.parse_args(["--model=--x", "--", "--modell"])
    assert args.model_name_or_path == "--x" and args.rest == ["--modell"]


def test_every_command_reads_its_options_alike():
    """A parser of argparse itself would suggest nothing."""
    files = [file for file in ROOT.glob("[!.]*/*.py") if file.parent.name != "tests"] + list(ROOT.glob("*.py"))
    assert len(files) > 80
    assert not [file for file in files if re.search(r"(argparse\.|Hf)ArgumentParser\(", file.read_text())]


def test_every_command_reads_its_options():
    """Also one that has none: it would begin to work when it is asked for --help."""
    files = [file for file in ROOT.glob("[!.]*/*.py") if file.parent.name != "tests"] + list(ROOT.glob("*.py"))
    commands = [file for file in files if '__name__ == "__main__"' in file.read_text()]
    assert len(commands) > 25
    assert not [file for file in commands if not re.search(r"CommandParser\(|\bparse\(", file.read_text())]


@pytest.mark.parametrize("script", [train_hf, generation.train], ids=lambda module: module.__name__)
def test_help_of_trainings_teaches(script, monkeypatch, capsys):
    """The docstring as written comes first; then our own options, each once; of transformers', the usual ones."""
    kinds = {
        "train_hf": KINDS,
        "generation.train": (
            generation.train.GeneratorArguments,
            generation.train.TokenArguments,
            generation.train.GeneratorTrainingArguments,
        ),
    }[script.__name__]
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as end:
        parse(kinds, ["--help"], script.__doc__)
    said = capsys.readouterr().out
    assert end.value.code == 0 and script.__doc__.strip() in said
    names = re.findall(r"^  --(\w+)", said, re.MULTILINE)
    assert len(names) == len(set(names)) and not re.search(r"--\w+-\w", said.replace(script.__doc__.strip(), ""))
    own = {field.name for kind in kinds[:2] for field in dataclasses.fields(kind)}
    own |= vars(kinds[2])["__annotations__"].keys() | vars(CommonTrainingArguments)["__annotations__"].keys()
    assert own <= set(names) and {"output_dir", "bf16", "max_steps"} <= set(names)
    assert names.index("train_data") < names.index("ema_decay") < names.index("output_dir")
    assert "dataloader_prefetch_factor" not in said and "main_classes/trainer" in said
