"""Each command's own mistakes of its user: one line, no traceback, and nothing half-written."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from transformers import AutoConfig, AutoModel

from eval.commands import ends_in_one_line
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel


OTHERS_SIZE = "must have the size of its original"
EVALUATE = "eval.reconstruction --network_metrics --output_dir out"
CLONE = f"{EVALUATE} --callable torch:clone --data images --image_size 32"
MODEL = f"{EVALUATE} --data images --model_name_or_path"
STATISTICS = "eval.reference_statistics --output_file out.npz --data images --image_size 32"
RAE = "convert.rae --output_dir out"
SIMVQ = "convert.simvq_checkpoint --output_dir out"
TRAIN = "train_hf --train_data images --max_steps 1 --report_to none --use_cpu --lpips_weight 0 --output_dir out"
TOKENIZE = "generation.tokenize_images --model_name_or_path model --data images --num_workers 0 --output_dir out"
NO_FOLDER = "There is no folder {} here, and no {} of this name could be had from the hub"


@pytest.fixture
def folder(tmp_path, image_folder, monkeypatch):
    """Where the commands run: what they can stumble over."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    (tmp_path / "sizes").mkdir()
    (tmp_path / "smaller").mkdir()
    for number in range(2):
        Image.new("RGB", (40, 40 + number)).save(tmp_path / "sizes" / f"{number}.png")
        Image.new("RGB", (20, 20)).save(tmp_path / "smaller" / f"{number}.png")
    for name in ("text.json", "text.pth", "text.npz", "text.yaml"):
        (tmp_path / name).write_text("{: no such thing")
    (tmp_path / "list.txt").write_text("nowhere.png\n")
    (tmp_path / "named.yaml").write_text("model: 3")
    (tmp_path / "other.json").write_text("[1]")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "theirs.py").write_text(
        "def numpy(pixels):\n    return pixels.numpy()\n\ndef half(x):\n    return x[:, :, ::2]\n\n"
        "def large(x):\n    return x.new_empty(10**15)\n\ndef normalised(x):\n    return (x - 0.5) / 0.2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    VQRAEModel(tiny_config()).save_pretrained(tmp_path / "model")
    VQRAEImageProcessor.for_image_size(32).save_pretrained(tmp_path / "model")
    VQRAEModel(tiny_config()).save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"half a file")
    AutoModel.from_config(AutoConfig.for_model("vit", hidden_size=8, num_attention_heads=1, num_hidden_layers=1,
        intermediate_size=8)).save_pretrained(tmp_path / "vit")  # fmt: skip
    for name in ("fields", "foreign"):
        (tmp_path / name).mkdir()
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "fields" / "config.json").write_text(json.dumps(fields | {"codebook_size": -1}))
    (tmp_path / "foreign" / "config.json").write_text(json.dumps({"model_type": "nothing we know"}))
    return tmp_path


def end(command: str, monkeypatch, capsys) -> str:
    """What a command says when it ends over an error; its last line where argparse says how it is used, too."""
    name, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as error:
        runpy.run_module(name, run_name="__main__")
    said = capsys.readouterr().err
    assert error.value.code in (1, 2) and "Traceback" not in said
    lines = [line for line in said.splitlines() if "error: " in line]
    assert len(lines) == 1 and said.rstrip("\n").endswith(lines[0]), said
    return lines[0].partition("error: ")[2]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    "command, message",
    [
        (f"{EVALUATE} --real images --fake nowhere", "nowhere"),
        (f"{EVALUATE} --real images --fake empty", "No images in empty"),
        (f"{EVALUATE} --real sizes --fake smaller --image_size 16", OTHERS_SIZE),
        (f"{EVALUATE} --real sizes --fake smaller --image_size 16 --num_workers 1", OTHERS_SIZE),
        (f"{EVALUATE} --real sizes --fake sizes", "pass --image_size"),
        (f"{EVALUATE} --real sizes --fake sizes --num_workers 1", "pass --image_size"),
        (f"{EVALUATE} --real images --fake sizes", "have no partner"),
        (f"{EVALUATE} --data images", "pass one of --model_name_or_path"),
        (f"{CLONE} --protocol adm", "No protocol 'adm'"),
        (f"{CLONE} --protocol nowhere.json", "No protocol 'nowhere.json'"),
        (f"{CLONE} --protocol text.json", "text.json is no JSON"),
        (f"{CLONE} --protocol other.json", "other.json"),
        (f"{CLONE} --protocol rae-256", "is for 256 px"),
        (f"{CLONE} --batch_size 0", "must be at least 1, got 0"),
        (f"{CLONE} --max_samples 0", "must be at least 1, got 0"),
        (f"{CLONE} --image_size -1", "must be at least 1, got -1"),
        (f"{CLONE} --num_workers -1", "must be at least 0, got -1"),
        (f"{CLONE} --device tpu9000", "'tpu9000' is not here"),
        (f"{CLONE} --device cuda:77", "'cuda:77' is not here"),
        (f"{CLONE} --network_metrics rfid --inception_weights nowhere.pth", "no file nowhere.pth"),
        (f"{CLONE} --network_metrics rfid --inception_weights text.pth", "text.pth is damaged, or no file of weights"),
        (f"{CLONE} --features nowhere", "nowhere"),
        (f"{CLONE} --features theirs:nothing", "'theirs:nothing' cannot be imported"),
        (f"{CLONE} --callable theirs:numpy", "theirs:numpy gave a ndarray"),
        (f"{CLONE} --callable theirs:half", "images of the size that it gets"),
        (f"{CLONE} --callable theirs", "'theirs' must be module:function"),
        (f"{CLONE} --data empty", "No images in empty"),
        (f"{CLONE} --data broken", "none of them could be read"),
        (f"{CLONE} --data list.txt", "nowhere.png"),
        (f"{CLONE} --data nobody/nothing", "nobody/nothing"),
        (f"{MODEL} nowhere", NO_FOLDER.format("nowhere", "model")),
        (f"{MODEL} ./no/such/folder", "There is no folder ./no/such/folder: check the path"),
        (f"{MODEL} empty", "empty"),
        (f"{MODEL} no/such/name", "There is no folder no/such/name: check the path"),
        (f"{TRAIN} --model_name_or_path model --train_data nowhere", NO_FOLDER.format("nowhere", "dataset")),
        (f"{TRAIN} --model_name_or_path nowhere", NO_FOLDER.format("nowhere", "model")),
        (f"{TRAIN} --encoder_name_or_path nobody/nothing", NO_FOLDER.format("nobody/nothing", "model")),
        (f"{TRAIN} --encoder_name_or_path ./vti", "There is no folder ./vti: check the path"),
        (f"{TRAIN} --model_name_or_path model --image_size 33", "not a multiple of its patch size 8: take 32"),
        (f"{TRAIN} --encoder_name_or_path vit --image_size 33", "not a multiple of its patch size 16: take 32"),
        (f"{TOKENIZE} --model_name_or_path nowhere", NO_FOLDER.format("nowhere", "model")),
        (f"{TOKENIZE} --data nowhere", NO_FOLDER.format("nowhere", "dataset")),
        (f"{TOKENIZE} --image_size 33", "must be a positive multiple of the tokenizer's patch, 8 px"),
        (f"{MODEL} damaged", "damaged cannot be loaded"),
        (f"{MODEL} vit", "not a tokenizer"),
        (f"{MODEL} fields", "codebook_size"),
        (f"{MODEL} foreign", "nothing we know"),
        (f"{MODEL} model --image_size 33", "model takes multiples of 8 px, such as 32"),
        (f"{MODEL} model --reference_model nowhere", "nowhere"),
        (f"{MODEL} model --update_model_card", "has no README.md"),
        ("eval.compare model", "pass at least two files"),
        ("eval.compare model/config.json nowhere.json", "there is no nowhere.json"),
        ("eval.compare model/config.json model/config.json", "is no results.json of schema 1"),
        ("eval.compare text.json text.json", "text.json is no JSON"),
        ("eval.compare other.json other.json", "other.json holds no fields"),
        (f"{STATISTICS} --protocol adm", "No protocol 'adm'"),
        (f"{STATISTICS} --data nowhere", "nowhere"),
        (f"{STATISTICS} --data empty", "No images in empty"),
        (f"{STATISTICS} --batch_size 0", "must be at least 1"),
        (f"{STATISTICS} --inception_weights text.pth", "text.pth is damaged"),
        (f"{STATISTICS} --device tpu9000", "'tpu9000' is not here"),
        (f"{RAE} --diffusers nowhere", "nowhere"),
        (f"{RAE} --diffusers model", "model"),
        (f"{RAE} --rae_config nowhere.yaml --decoder text.pth", "nowhere.yaml"),
        (f"{RAE} --rae_config text.yaml --decoder text.pth", "text.yaml"),
        (f"{RAE} --rae_config other.json --decoder text.pth", "other.json"),
        ("convert.rae --output_dir model --diffusers nowhere", "model exists"),
        (f"{RAE} --diffusers model --device tpu9000", "'tpu9000' is not here"),
        (f"{SIMVQ} --checkpoint text.pth --config nowhere.yaml", "nowhere.yaml is no file"),
        (f"{SIMVQ} --checkpoint text.pth --config text.yaml", "text.yaml is no YAML"),
        (f"{SIMVQ} --checkpoint text.pth --config named.yaml", "named.yaml is no config.yaml"),
        ("convert.float16 --output_dir out --model_name_or_path nowhere", "nowhere has no model.safetensors"),
        ("convert.float16 --output_dir out --model_name_or_path damaged", "damaged"),
        ("convert.float16 --output_dir out --model_name_or_path model --data empty", "No images in empty"),
        ("convert.float16 --output_dir out --model_name_or_path model --data nowhere", "nowhere"),
        ("benchmarks.evaluation --data nowhere", "nowhere"),
        ("benchmarks.fused_latents --encoder vit --train_data nowhere --heldout a=images --output_dir out", "nowhere"),
        ("benchmarks.collapse --encoder empty --data images --output_dir out", "empty"),
        ("benchmarks.collapse --encoder nowhere --data images --output_dir out --config nowhere.json", "nowhere.json"),
        ("benchmarks.collapse --encoder nowhere --data images --output_dir out --config text.json", "text.json"),
        ("benchmarks.quantizer --sections table --rows 5", "invalid row value: '5'"),
        ("benchmarks.quantizer --device tpu9000", "'tpu9000' is not here"),
    ],
)  # fmt: skip
def test_mistakes_end_a_command_in_one_line(command, message, folder, monkeypatch, capsys):
    assert message in end(command, monkeypatch, capsys)
    assert not (folder / "out" / "results.json").exists() and not (folder / "out.npz").exists()
    assert not (folder / "out" / "config.json").exists()


def out_of_memory_of_a_gpu(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")


def too_large(*_, **__):
    return torch.empty(10**15)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("fails, asked", [(too_large, "4000000000000000 bytes"), (out_of_memory_of_a_gpu, "2.00 GiB")])
@pytest.mark.parametrize(
    "command, options",
    [
        (f"{TRAIN} --model_name_or_path model", "--per_device_train_batch_size and --per_device_eval_batch_size"),
        (f"{MODEL} model", "--batch_size or --image_size"),
        (TOKENIZE, "--batch_size or --image_size"),
    ],
)
def test_memory_that_does_not_suffice_ends_in_what_to_lower(
    command, options, fails, asked, folder, monkeypatch, capsys
):
    monkeypatch.setattr(VQRAEModel, "_image_features", fails)
    said = end(command, monkeypatch, capsys)
    assert said.startswith(f"The memory did not suffice when {asked} more were needed: lower {options}")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_memory_of_their_function_too(folder, monkeypatch, capsys):
    assert "lower --batch_size" in end(CLONE.replace("torch:clone", "theirs:large"), monkeypatch, capsys)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_normalised_reconstructions_are_told(folder, monkeypatch, capsys):
    """As pixels of our own models, which refuse them, they would be an error."""
    monkeypatch.setattr(
        sys, "argv", ["reconstruction.py", *CLONE.replace("torch:clone", "theirs:normalised").split()[1:]]
    )
    runpy.run_module("eval.reconstruction", run_name="__main__")
    assert "they must be in [0, 1], as what they are made of is. Undo a normalisation." in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("offline", [False, True])
def test_a_push_without_a_network_says_so(offline, folder, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    said = end(f"{TOKENIZE} --push_to_hub me/tokens --token hf_none", monkeypatch, capsys)
    assert said.startswith("The hub could not be reached (") and "give the same command again" in said
    assert (folder / "out" / "train-00000.parquet").exists()


class Begun(Exception):
    """In place of something that takes long."""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    "command, begins, line",
    [
        (f"{TRAIN} --model_name_or_path model", "reading.models.load_pretrained", "Loading the tokenizer model"),
        (f"{TRAIN} --encoder_name_or_path vit", "modeling_simvq.VQRAEModel.from_encoder_pretrained", "Loading the enc"),
        (f"{TRAIN} --model_name_or_path model --convnext_weight 1", "training.losses._load", "Loading the networks of"),
        (
            f'{TRAIN} --encoder_name_or_path vit --model_config {{"codebook_size":8,"image_size":64}} --token_passes 1',
            "training.token_passes._identity",
            "Tokens of 11 images",
        ),
        (f"{MODEL} model", "reading.models.load_any", "Loading the tokenizer model"),
        (f"{MODEL} model", "eval.evaluation.Evaluation.compute", "Computing the metrics of 12 images"),
        (f"{MODEL} model", "eval.flat_colours.measure_flat_colours", "Reconstructing images of one colour"),
        (f"{MODEL} model", "eval.results.write_results", "Drawing some images, and writing the results"),
        (TOKENIZE, "reading.models.AutoModel.from_pretrained", "Loading the tokenizer model"),
        (TOKENIZE, "generation.source.source_hash", "Looking whether the 12 images of images are"),
        (TOKENIZE, "generation.card.draw_rows", "Reading the shards again, and decoding 16 rows"),
        (f"{TOKENIZE} --push_to_hub me/tokens", "huggingface_hub.HfApi.create_repo", "Pushing to me/tokens"),
    ],
)
def test_what_may_take_long_is_said_before_it_begins(command, begins, line, folder, monkeypatch, capsys):
    def stop(*_, **__):
        raise Begun

    monkeypatch.setattr(begins, stop)
    name, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(Begun):
        runpy.run_module(name, run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].startswith(line)


def test_ctrl_c_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as end, ends_in_one_line():
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert "interrupted. What can be resumed goes on" in capsys.readouterr().err
