"""Training with fused latents: what the fit has made stays in stage 1, and moves with the encoder in stage 2."""

import copy
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_fused_latents import fused_model
from test_loading import ROOT
from test_tokens import same
from test_training import make_trainer

from modeling_simvq import VQRAEModel
from training.trainer import CropsToFit


pytestmark = pytest.mark.timeout(300)


def start(**fields) -> VQRAEModel:
    return fused_model(codebook_init="kmeans", codebook_size=24, decoder_mixing="both", **fields).train()


def moved(before: dict, model, name: str) -> bool:
    return not torch.equal(before[name], model.state_dict()[name])


def after_fit(model, folder, output_dir, **options):
    """The trainer, and the weights that its fit has made, before the first step."""
    trainer = make_trainer(model, folder, output_dir, seed=1, **options)
    trainer.initialize_codebook()
    return trainer, copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("trained", [False, True])
def test_stage_1_keeps_the_projections_unless_asked(trained, tmp_path, image_folder):
    trainer, before = after_fit(start(), image_folder, tmp_path, train_projections=trained, max_steps=2)
    trainer.train()
    model = trainer.model
    assert moved(before, model, "project_in.weight") == moved(before, model, "project_out.weight") == trained
    assert moved(before, model, "decoder.linear_path.to_patches.weight") and moved(
        before, model, "decoder.decoder_pred.weight"
    )
    assert not any(moved(before, model, name) for name in before if name.startswith("encoder."))


def test_stage_2_trains_projections_with_the_encoder(tmp_path, image_folder):
    trainer, before = after_fit(
        start(freeze_encoder=False), image_folder, tmp_path, max_steps=1, encoder_learning_rate=1e-5,
        learning_rate=1e-3, distillation_weight=1.0, warmup_steps=0, max_grad_norm=0.0,
    )  # fmt: skip
    trainer.train()
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    initial = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == initial.keys()
    model = trainer.model
    assert initial[id(model.project_in.weight)] == initial[id(next(model.encoder.parameters()))] == 1e-5
    assert initial[id(model.project_out.weight)] == 1e-3
    assert moved(before, model, "project_in.weight") and moved(before, model, "project_out.weight")


def test_tokens_computed_once_train_the_same_decoder(tmp_path, image_folder):
    runs = []
    for options in ({"token_passes": 3}, {"quantizer_lr_multiplier": 0.0, "vq_weight": 0.0}):
        trainer = make_trainer(start(), image_folder, tmp_path / str(len(runs)), seed=1, max_steps=9, **options)
        trainer.train()
        runs.append(trainer.model.state_dict())
    assert same(*runs)
    with pytest.raises(ValueError, match="train_projections"):
        make_trainer(start(), image_folder, tmp_path / "x", token_passes=1, train_projections=True)


def test_a_fit_reads_the_same_crops_twice(tmp_path, image_folder):
    trainer = make_trainer(start(), image_folder, tmp_path, seed=3, per_device_train_batch_size=5)
    crops = CropsToFit(trainer, 31)  # more than two of each image
    first, second = (torch.cat(list(crops)) for _ in range(2))
    assert len(first) == 31 and torch.equal(first, second)
    assert len({crop.numpy().tobytes() for crop in first}) == 31


def test_the_card_says_what_was_fitted(tmp_path, image_folder):
    trainer = make_trainer(start(), image_folder, tmp_path, max_steps=1, codebook_init_images=20)
    trainer.train()
    trainer.create_model_card()
    assert "were fitted to 20 crops, 320 tokens: 12 directions keep" in (tmp_path / "README.md").read_text()
    assert trainer.model.config.latents_fit["images"] == 20


PROGRAM = """
import os, signal, sys
sys.path[:0] = {paths!r}
from transformers import TrainerCallback
from test_fused_training import make_trainer, start

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = make_trainer(start(), {folder!r}, "out", seed=1, max_steps=8, save_strategy="steps", save_steps=2)
if sys.argv[1] == "kill":
    trainer.add_callback(Kill())
trainer.train(resume_from_checkpoint=True if sys.argv[1] == "resume" else None)
trainer.save_model("end")
"""


def test_a_killed_and_resumed_stage_1_is_equal_to_the_bit(tmp_path, image_folder):
    program = PROGRAM.format(paths=[str(ROOT), str(ROOT / "tests")], folder=str(image_folder))
    (tmp_path / "program.py").write_text(program)

    def run(what: str, code: int) -> None:
        done = subprocess.run(
            [sys.executable, "program.py", what], cwd=tmp_path, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == code, done.stderr

    run("whole", 0)
    expected = load_file(tmp_path / "end" / "model.safetensors")
    shutil.rmtree(tmp_path / "out"), shutil.rmtree(tmp_path / "end")
    run("kill", -signal.SIGKILL)
    run("resume", 0)
    resumed = load_file(tmp_path / "end" / "model.safetensors")
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
