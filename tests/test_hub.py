"""Against a hub in this process, by huggingface_hub's own client: pushes, loads in fresh processes, runs that push
while they train and that are resumed from the hub, refusals, cards. And what those load who trust our code."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import encoder_config, tiny_config
from hub import TOKEN, LocalHub
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from test_loading import ROOT, run
from transformers import AutoModel, ViTImageProcessor

import convert.rae
import convert.simvq_checkpoint
import train_hf
import training.card
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from training.card import Provenance, write_recipe
from training.hub import export_checkpoint, import_checkpoint


CODE = [
    "configuration_simvq.py",
    "decoding_simvq.py",
    "fitting_simvq.py",
    "image_processing_simvq.py",
    "modeling_simvq.py",
    "quantization_simvq.py",
    "tokenizer_simvq.py",
]
GAN_CODE = ["configuration_simvq_gan.py", "modeling_simvq_gan.py"]
LOAD = """
import sys, torch
from transformers import AutoImageProcessor, AutoModel
name, expected, *pairs = sys.argv[1:]
options = dict(pair.split("=") for pair in pairs)
options = {key: value == "True" if value in ("True", "False") else value for key, value in options.items()}
model = AutoModel.from_pretrained(name, trust_remote_code=True, **options).eval()
processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True, **options)
pixels = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
if expected != "-":
    assert torch.equal(model(pixels).image_tokens, torch.load(expected, weights_only=True))
assert processor.postprocess(pixels)[0].size == (32, 32)
assert "transformers_modules" in type(model).__module__ and "transformers_modules" in type(processor).__module__
"""


LOAD_ALL = """
import sys
from transformers import AutoImageProcessor, AutoModel
name, *revisions = sys.argv[1:]
for revision in revisions:
    AutoModel.from_pretrained(name, trust_remote_code=True, revision=revision)
    AutoImageProcessor.from_pretrained(name, trust_remote_code=True, revision=revision)
"""


@pytest.fixture
def hub():
    with LocalHub() as hub:
        yield hub
    assert not hub.unknown


@pytest.fixture
def expected_tokens(tmp_path):
    """A function from a model to a file of the tokens that `LOAD` must find."""

    def tokens(model, name) -> str:
        with torch.no_grad():
            found = model.eval()(torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)).image_tokens
        torch.save(found, tmp_path / name)
        return str(tmp_path / name)

    return tokens


def load_elsewhere(hub, tmp_path, name, expected="-", cache="cache", **options) -> None:
    pairs = [f"{key}={value}" for key, value in options.items()]
    run(["-c", LOAD, name, expected, *pairs], tmp_path, **hub.environment, HF_HOME=str(tmp_path / cache))


PUSH = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
for line in sys.argv[2:]:
    exec(line)
"""


def test_push_and_load_in_a_fresh_process(hub, tmp_path, expected_tokens):
    torch.manual_seed(0)
    models = [VQRAEModel(tiny_config()), VQRAEModel(tiny_config(codebook_size=512))]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / f"model{number}")
    load = "model = VQRAEModel.from_pretrained('model{}')"
    run(
        [
            "-c", PUSH, str(ROOT), load.format(0), "model.push_to_hub('user/tokenizer', private=True)",
            "VQRAEImageProcessor.for_image_size(32).push_to_hub('user/tokenizer')", load.format(1),
            "model.push_to_hub('user/tokenizer', revision='larger', create_pr=False)",
            "VQRAEImageProcessor.for_image_size(32).save_pretrained('model1')",
            "from huggingface_hub import upload_folder",
            "upload_folder(repo_id='user/tokenizer', folder_path='model1', path_in_repo='sub')",
        ],
        tmp_path,
        **hub.environment,
    )  # fmt: skip
    first = hub.history("user/tokenizer")[1]
    assert {*CODE, "config.json", "model.safetensors", "preprocessor_config.json"} <= first.keys()
    uploads = {path for method, path in hub.requests if method == "PUT"}
    assert uploads and all(path.startswith("/lfs/") for path in uploads)  # the weights
    assert hub.private == {"user/tokenizer"}
    tokens = [expected_tokens(model, f"tokens{number}") for number, model in enumerate(models)]
    load_elsewhere(hub, tmp_path, "user/tokenizer", tokens[0])
    load_elsewhere(hub, tmp_path, "user/tokenizer", tokens[1], subfolder="sub")
    load_elsewhere(hub, tmp_path, "user/tokenizer", tokens[0], revision=hub.commits["user/tokenizer"][2][0])
    load_elsewhere(hub, tmp_path, "user/tokenizer", tokens[1], revision="larger", cache="cache2")
    seen = len(hub.requests)
    load_elsewhere(hub, tmp_path, "user/tokenizer", tokens[0], local_files_only=True)
    assert len(hub.requests) == seen


def test_missing_and_gated_repositories_say_what_to_do(hub, tmp_path):
    code = "from transformers import AutoModel; AutoModel.from_pretrained('user/{}', trust_remote_code=True)"
    environment = hub.environment | {"HF_HOME": str(tmp_path / "cache")}
    with pytest.raises(AssertionError, match="not a (local folder|valid model identifier)"):
        run(code.format("nothing"), tmp_path, **environment)
    run("from huggingface_hub import create_repo; create_repo('user/gated')", tmp_path, **environment)
    hub.gated.add("user/gated")
    with pytest.raises(AssertionError, match="gated repo"):
        run(code.format("gated"), tmp_path, **environment)


UPLOAD = """
from huggingface_hub import create_repo, upload_folder
create_repo("user/run", exist_ok=True)
upload_folder(repo_id="user/run", folder_path={!r})
"""


def test_an_interrupted_upload_leaves_the_previous_revision(hub, tmp_path, expected_tokens):
    """Where the weights are announced, where they are sent, and where the commit is made."""
    for name, seed in (("old", 0), ("new", 1)):
        torch.manual_seed(seed)
        VQRAEModel(tiny_config()).save_pretrained(tmp_path / name)
        VQRAEImageProcessor.for_image_size(32).save_pretrained(tmp_path / name)
    run(UPLOAD.format("old"), tmp_path, **hub.environment)
    before = hub.files("user/run")
    for fails_at in ("/info/lfs/objects/batch$", "^/lfs/", "/commit/"):
        hub.fails_at = fails_at
        with pytest.raises(AssertionError, match="broken on purpose"):
            run(UPLOAD.format("new"), tmp_path, **hub.environment)
        assert hub.files("user/run") == before
    hub.fails_at = None
    model = VQRAEModel.from_pretrained(tmp_path / "old")
    load_elsewhere(hub, tmp_path, "user/run", expected_tokens(model, "tokens"))


# Training ------------------------------------------------------------------------------------------------------------


def train(hub, tmp_path, image_folder, output_dir, *extra) -> str:
    fields = {"encoder_config": encoder_config(), "image_size": 32, "decoder_patch_size": 8, "codebook_size": 64}
    fields |= {"decoder_num_hidden_layers": 1}
    return run(
        [
            str(ROOT / "train_hf.py"), "--model_config", json.dumps(fields), "--train_data", str(image_folder),
            "--eval_data", str(image_folder), "--output_dir", output_dir, "--max_steps", "6", "--save_steps", "2",
            "--save_strategy", "steps", "--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "1",
            "--per_device_train_batch_size", "2", "--lpips_weight", "0", "--report_to", "none", "--use_cpu",
            "--gan_weight", "0.1", *extra,
        ],
        tmp_path,
        **hub.environment,
        HF_HOME=str(tmp_path / "cache_of_training"),
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_commit_of_a_run_can_be_loaded(hub, tmp_path, image_folder, strategy):
    train(
        hub, tmp_path, image_folder, "out", "--push_to_hub", "--hub_model_id", "user/run", "--hub_strategy", strategy,
        "--hub_always_push", "--license", "apache-2.0",
    )  # fmt: skip
    history = hub.history("user/run")
    assert len(history) == (1 if strategy == "end" else 4)
    for number, files in enumerate(history):
        pickles = [name for name in files if re.search(r"\.(pt|pth|bin|pkl|ckpt)$", name)]
        starts = {name: content[:4] for name, content in files.items()}
        assert not pickles and not [
            n for n, s in starts.items() if s == b"PK\x03\x04" or s[:2] in (b"\x80\x02", b"\x80\x04")
        ]
        everything = b"".join(content for name, content in files.items() if not name.endswith(".png"))
        assert str(tmp_path).encode() not in everything and b"hf_tokenoftests" not in everything
        folder = tmp_path / f"commit{number}"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        card = ModelCard.load(folder / "README.md")
        assert card.data.license == "apache-2.0" and "train_hf" not in card.text
        picture = re.search(r"!\[held-out images\]\((.*)\)", card.text)[1]
        assert Image.open(folder / picture).width > 100
        assert {*CODE, "training_recipe.json", "raw_weights.safetensors"} <= files.keys()
    revisions = [revision for revision, _ in hub.commits["user/run"][1:]]
    run(["-c", LOAD_ALL, "user/run", *revisions], tmp_path, **hub.environment, HF_HOME=str(tmp_path / "cache"))
    names = set(history[-1])
    assert ("last-checkpoint/trainer_state.json" in names) == (strategy == "checkpoint")
    assert ("checkpoint-4/trainer_state.json" in names) == (strategy == "all_checkpoints")
    assert not (tmp_path / "out" / "_push").exists()


def test_a_run_whose_pushes_are_interrupted_leaves_what_was_there(hub, tmp_path, image_folder):
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "model.safetensors").write_bytes(b"of an earlier run")
    run(UPLOAD.format("earlier"), tmp_path, **hub.environment)
    before = hub.files("user/run")
    assert before["model.safetensors"] == b"of an earlier run"
    hub.fails_at = "/commit/"
    with pytest.raises(AssertionError, match="broken on purpose"):
        train(hub, tmp_path, image_folder, "out", "--push_to_hub", "--hub_model_id", "user/run")
    assert hub.files("user/run") == before


def test_a_run_is_resumed_from_the_hub(hub, tmp_path, image_folder):
    push = ["--push_to_hub", "--hub_model_id", "user/run", "--hub_strategy", "checkpoint", "--hub_always_push"]
    train(hub, tmp_path, image_folder, "whole")
    train(hub, tmp_path, image_folder, "half", *push, "--save_steps", "4")  # saved at 4 and at the end, 6
    middle = next(
        revision for revision, files in hub.commits["user/run"][1:]
        if json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 4
    )  # fmt: skip
    output = train(hub, tmp_path, image_folder, "resumed", "--resume_from_checkpoint", f"user/run@{middle}")
    assert "Fetching the last checkpoint of user/run" in output
    for name in ("model.safetensors", "raw_weights.safetensors", "discriminator.safetensors"):
        expected, found = (load_file(tmp_path / run_of / name) for run_of in ("whole", "resumed"))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
    assert (tmp_path / "resumed" / "checkpoint-4" / "optimizer.pt").exists()
    again = train(hub, tmp_path, image_folder, "resumed", "--resume_from_checkpoint", f"user/run@{middle}")
    assert "resumed is finished (step 6 of 6)" in again
    longer = ["--max_steps", "7", "--learning_rate", "1e-4"]
    again = train(hub, tmp_path, image_folder, "resumed", "--resume_from_checkpoint", f"user/run@{middle}", *longer)
    assert "Resuming from resumed/checkpoint-6" in again  # its own, not that of the hub once more
    assert "learning_rate: None before, 0.0001 now" in again and "max_steps: 6 before, 7 now" in again
    assert "save_steps" not in again
    hub.branches["user/run"]["before"] = hub.commits["user/run"][0][0]
    for name, message in (
        ("user/run@before", "has no last-checkpoint"),
        ("runs/x/checkpoint-3", "neither a folder nor"),
    ):
        with pytest.raises(AssertionError, match=message):
            train(hub, tmp_path, image_folder, "no", "--resume_from_checkpoint", name)


DOWNLOAD = """
import sys
sys.path.insert(0, sys.argv[1])
from training.hub import find_checkpoint
for name in sys.argv[3:]:
    try:
        print(name, "is", find_checkpoint(name, name.partition("/")[2], sys.argv[2] or None))
    except ValueError as error:
        print(name, "failed:", error)
"""


def test_steps_in_a_downloaded_state_are_numbers_and_its_path_is_forgotten(hub, tmp_path):
    """Repositories with a last-checkpoint that has nothing but a state."""
    states = {
        "good": {"global_step": 3, "best_global_step": 2, "best_model_checkpoint": "/etc"},
        "elsewhere": {"global_step": "../../elsewhere"},
        "best": {"global_step": 3, "best_global_step": "../x"},
        "negative": {"global_step": -1},
        "none": {},
    }
    upload = ["from huggingface_hub import create_repo, upload_folder"]
    for name, state in states.items():
        (tmp_path / f"of-{name}" / "last-checkpoint").mkdir(parents=True)
        (tmp_path / f"of-{name}" / "last-checkpoint" / "trainer_state.json").write_text(json.dumps(state))
        upload.append(f"create_repo('user/{name}', private=True)")
        upload.append(f"upload_folder(repo_id='user/{name}', folder_path='of-{name}')")
    run(["-c", PUSH, str(ROOT), *upload], tmp_path, **hub.environment)
    anonymous = hub.environment | {"HF_TOKEN": "", "HF_HOME": str(tmp_path / "cache")}
    private = run(["-c", DOWNLOAD, str(ROOT), "", "user/good"], tmp_path, **anonymous)
    assert "user/good failed" in private and "can be read" in private
    found = run(["-c", DOWNLOAD, str(ROOT), TOKEN, *(f"user/{name}" for name in states)], tmp_path, **anonymous)
    assert "user/good is good/checkpoint-3\n" in found
    assert [path.name for path in (tmp_path / "good").iterdir()] == ["checkpoint-3"]
    state = json.loads((tmp_path / "good" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state == {"global_step": 3, "best_global_step": 2, "best_model_checkpoint": None}
    for name in states.keys() - {"good"}:
        assert re.search(rf"user/{name} failed: user/{name}: .*trainer_state.json", found), found
        assert not (tmp_path / name).exists()


def test_one_process_looks_for_the_checkpoint_of_all(tmp_path):
    """The other one gets there late, when the download is among the run's own checkpoints already. An error of the one
    that looks is one of both."""
    (tmp_path / "program.py").write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from accelerate import PartialState
import training.hub
from training.hub import find_checkpoint, on_main_process

def download(name, output_dir, token):
    if name == "user/nothing":
        raise ValueError("no such repository")
    os.makedirs("out/checkpoint-3")
    return "out/checkpoint-3"

training.hub.download_checkpoint = download
state = PartialState(cpu=True)
while not state.is_main_process and not os.path.exists("out/checkpoint-3"):
    time.sleep(0.1)
assert on_main_process(lambda: find_checkpoint("user/run", "out")) == "out/checkpoint-3"
try:
    on_main_process(lambda: find_checkpoint("user/nothing", "nowhere"))
except (ValueError, RuntimeError) as error:
    assert "no such repository" in str(error) and isinstance(error, ValueError) == state.is_main_process
    print("together", flush=True)
os._exit(0)
""")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("together") == 2


def test_states_survive_as_safetensors(tmp_path):
    import random

    import numpy as np

    parameter = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    states = {
        "optimizer.pt": optimizer.state_dict(),
        "rng_state.pth": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.random.get_rng_state(),
        },
        "scheduler.pt": {"base_lrs": [1e-3], "last_epoch": 3, "_get_lr_called_within_step": False, "x": None},
    }
    source = tmp_path / "checkpoint-1"
    source.mkdir()
    for name, state in states.items():
        torch.save(state, source / name)
    (source / "trainer_state.json").write_text("{}")
    export_checkpoint(source, tmp_path / "exported")
    names = sorted(path.name for path in (tmp_path / "exported").iterdir())
    assert names == sorted(["trainer_state.json", *(f"{name}.state.safetensors" for name in states)])
    import_checkpoint(tmp_path / "exported")
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == sorted(["trainer_state.json", *states])
    from transformers.trainer_pt_utils import safe_globals

    with safe_globals():
        back = {name: torch.load(tmp_path / "exported" / name, weights_only=True) for name in states}
    assert back["scheduler.pt"] == states["scheduler.pt"]
    assert back["rng_state.pth"]["python"] == random.getstate()
    kind, keys, *rest = np.random.get_state()
    assert back["rng_state.pth"]["numpy"][0] == kind and (back["rng_state.pth"]["numpy"][1] == keys).all()
    assert list(back["rng_state.pth"]["numpy"][2:]) == rest
    assert torch.equal(back["rng_state.pth"]["cpu"], states["rng_state.pth"]["cpu"])
    again = torch.optim.AdamW([parameter], lr=1e-3)
    again.load_state_dict(back["optimizer.pt"])
    for key, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(again.state_dict()["state"][0][key], value)
    assert optimizer.state_dict()["param_groups"] == again.state_dict()["param_groups"]


@pytest.mark.parametrize("option", ["--model_name_or_path", "--encoder_name_or_path"])
def test_revision_and_token_reach_the_hub_and_no_file(hub, tmp_path, image_folder, option):
    """A private repository whose branch has other weights and another licence than its main; nobody is logged in."""
    if option == "--encoder_name_or_path":
        config = tiny_config("vit").encoder_config
        first, second = (AutoModel.from_config(config) for _ in range(2))
    else:
        first, second = VQRAEModel(tiny_config()), VQRAEModel(tiny_config(codebook_size=512))
    for model, name, licence in ((first, "first", "mit"), (second, "second", "cc-by-4.0")):
        model.save_pretrained(tmp_path / name)
        processor = ViTImageProcessor(size=32) if "encoder" in option else VQRAEImageProcessor.for_image_size(32)
        processor.save_pretrained(tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n# {name}\n")
    lines = [
        "from huggingface_hub import create_branch, create_repo, upload_folder",
        "create_repo('user/secret', private=True)",
        "upload_folder(repo_id='user/secret', folder_path='first')", "create_branch('user/secret', branch='other')",
        "upload_folder(repo_id='user/secret', folder_path='second', revision='other')",
    ]  # fmt: skip
    run(["-c", PUSH, str(ROOT), *lines], tmp_path, **hub.environment)
    anonymous = hub.environment | {"HF_TOKEN": "", "HF_HOME": str(tmp_path / "home")}
    run(
        [
            str(ROOT / "train_hf.py"), option, "user/secret", "--revision", "other", "--token", TOKEN, "--train_data",
            str(image_folder), "--eval_data", str(image_folder), "--output_dir", "out", "--max_steps", "1",
            "--per_device_train_batch_size", "4", "--lpips_weight", "0", "--report_to", "none", "--use_cpu",
            *(["--model_config", '{"codebook_size": 64, "codebook_init": "gaussian"}'] if "encoder" in option else []),
        ],
        tmp_path,
        **anonymous,
    )  # fmt: skip
    trained = load_file(tmp_path / "out" / "model.safetensors")
    if option == "--encoder_name_or_path":
        expected = load_file(tmp_path / "second" / "model.safetensors")
        assert all(torch.equal(trained[f"encoder.{n}"], x) for n, x in expected.items() if f"encoder.{n}" in trained)
        assert sum(name.startswith("encoder.") for name in trained) > 10
        assert "`user/secret`: cc-by-4.0" in (tmp_path / "out" / "README.md").read_text()
    else:
        assert len(trained["quantizer.embedding.weight"]) == 512
        assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "cc-by-4.0"
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]


def test_revision_and_token_reach_datasets(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"image": []})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    options = train_hf.DataArguments("org/images", dataset_revision="v2", dataset_config_name="full")
    train_hf.load_data(options, SimpleNamespace(output_dir="nowhere"), Path("nowhere"), "secret")
    assert [args for args, _ in asked] == [("org/images", "full")] * 2
    assert all((kwargs["revision"], kwargs["token"]) == ("v2", "secret") for _, kwargs in asked)
    assert [kwargs["split"] for _, kwargs in asked] == ["train", "validation"]


# The card ------------------------------------------------------------------------------------------------------------


def test_the_card_tells_what_the_run_did_and_its_code_runs(hub, tmp_path, image_folder):
    parent = tmp_path / "parent"
    torch.manual_seed(0)
    VQRAEModel(tiny_config(freeze_encoder=True)).save_pretrained(parent)
    VQRAEImageProcessor.for_image_size(32).save_pretrained(parent)
    (parent / "README.md").write_text(
        "---\nlicense: cc-by-4.0\nbase_model: facebook/dinov2-small\n---\n# Parent\n"
        "## Training\n\n9 steps of before.\n\nHeld-out images after step 9:\n\n## Limits\n"
    )
    (tmp_path / "notes.md").write_text("## Images\n\nPainted by hand.\n")
    options = [
        "--stage", "2", "--model_name_or_path", "parent", "--train_data", str(image_folder), "--eval_data",
        str(image_folder), "--output_dir", "child", "--max_steps", "3", "--eval_strategy", "steps", "--eval_steps", "3",
        "--logging_steps", "1", "--per_device_train_batch_size", "4", "--lpips_weight", "0", "--report_to", "none",
        "--use_cpu", "--seed", "7", "--hub_token", "hf_secret", "--card_notes", "notes.md", "--token", "hf_other",
    ]  # fmt: skip
    run([str(ROOT / "train_hf.py"), *options], tmp_path, **hub.environment)
    card = ModelCard.load(tmp_path / "child" / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.base_model == "facebook/dinov2-small"
    assert card.data.pipeline_tag == "image-feature-extraction" and card.data.library_name == "transformers"
    assert card.data.datasets is None  # a local folder
    for fact in (
        "3 steps of 4 random crops of 12 images",
        "the tokenizer `parent`",
        "encoder trained, seed 7",
        "distillation 1",
        "One image of 32 px becomes 16 tokens",
        "Held-out images after step 3",
        "The steps took 0 minutes on",
        "Before that, `parent`: 9 steps of before.",
        "## Images\n\nPainted by hand.",
    ):
        assert fact in card.text, fact
    assert "step 9" not in card.text  # numbers of other weights
    assert str(tmp_path) not in card.text and "GAN" not in card.text and "k-means" not in card.text
    recipe = (tmp_path / "child" / "training_recipe.json").read_text()
    assert "hf_" not in recipe and str(tmp_path) not in recipe and json.loads(recipe)["seed"] == 7
    import hashlib

    assert hashlib.sha256(recipe.encode()).hexdigest() in card.text
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "image.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)
    run(
        code + "\nassert image.size == (32, 32) and tokens.shape == (1, 4, 4)", tmp_path, HF_HOME=str(tmp_path / "home")
    )


@pytest.mark.parametrize("card", [training.card.TEXT, convert.rae.CARD, convert.simvq_checkpoint.CARD])
def test_every_card_shows_the_code_of_one_place(card):
    assert "{usage}" in card and "```" not in card


def test_a_recipe_lacks_secrets_and_nothing_else(tmp_path):
    given = {"token": "a", "hub_token": "b", "some_password": "c", "token_passes": 2, "push_to_hub": True}
    write_recipe(Provenance(recipe=given | {"include_num_input_tokens_seen": "no", "seed": 7}), tmp_path)
    kept = {"token_passes": 2, "push_to_hub": True, "include_num_input_tokens_seen": "no", "seed": 7}
    assert json.loads((tmp_path / "training_recipe.json").read_text()) == kept


# What is trusted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CODE + GAN_CODE)
def test_code_that_is_trusted_is_small_and_touches_nothing(file):
    """Copied beside every checkpoint and run by those who pass `trust_remote_code`."""
    tree = ast.parse((ROOT / file).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.split(".")[0])
    own = {Path(name).stem for name in CODE + GAN_CODE}
    standard = {"collections", "contextlib", "copy", "dataclasses", "difflib", "inspect", "math"}
    assert imported <= {"torch", "transformers", "huggingface_hub", "packaging", *standard} | own
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"open", "exec", "eval", "compile", "__import__", "getattr_static", "input", "breakpoint"}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    touching = {"system", "popen", "environ", "write_text", "write_bytes", "read_text", "unlink", "rmtree", "urlopen"}
    assert not attributes & (touching | {"load_state_dict_from_url", "hub"})
    assert not [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len((ROOT / file).read_text().splitlines()) < 1200
