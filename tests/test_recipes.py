"""Every recipe in configs/ parses, names its source, and runs two steps with tiny networks."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import encoder_config
from test_loading import ROOT
from test_losses import Perceptual
from transformers import AutoConfig, AutoModel

import train_hf


OTHERS = "collapse", "fused_latents", "emoji_llama"  # of benchmarks, and of generation.train
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.json") if path.stem not in OTHERS)


@pytest.fixture(scope="module")
def tiny_networks(tmp_path_factory):
    """A vision encoder, a stage 1 on it, and the ViT of a discriminator."""
    folder = tmp_path_factory.mktemp("networks")
    for name, overrides in (("encoder", {}), ("vit", {"num_hidden_layers": 4, "image_size": 224, "patch_size": 32})):
        config = AutoConfig.for_model(**encoder_config("vit", **overrides))
        AutoModel.from_config(config).save_pretrained(folder / name)
    model = train_hf.VQRAEModel.from_encoder_pretrained(str(folder / "encoder"), codebook_size=64, codebook_dim=16)
    model.save_pretrained(folder / "stage1")
    model = train_hf.VQRAEModel.from_encoder_pretrained(str(folder / "encoder"), codebook_size=64)
    model.initialize_codebook([torch.rand(16, 3, 32, 32)])
    model.save_pretrained(folder / "fitted")
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_name_their_source_and_deviations(recipe):
    options = json.loads(recipe.read_text())
    assert len(options["_source"]) > 20 and options["_deviations"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_two_steps(recipe, tiny_networks, tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr("training.losses.PerceptualLoss", Perceptual)
    monkeypatch.setattr("training.losses.ConvNextLoss", Perceptual)
    options = json.loads(recipe.read_text())
    weights = ("l1_weight", "l2_weight", "lpips_weight", "convnext_weight", "gan_weight", "distillation_weight")
    asked_for = {name.removesuffix("_weight") for name in weights if options.get(name)}
    fields = {
        name: value
        for name, value in options.get("model_config", {}).items()
        if name in ("codebook_dim", "encoder_layers")
    }
    fields = {name: 16 if name == "codebook_dim" else [1, 2] for name in fields} | {
        "codebook_size": 64,
        "decoder_num_hidden_layers": 1,
    }
    if "encoder_config" in options.get("model_config", {}):
        fields |= {"encoder_config": encoder_config("vit"), "decoder_patch_size": 8, "image_size": 32}
        fields["freeze_encoder"] = options["model_config"]["freeze_encoder"]
    tiny = {
        "train_data": str(image_folder), "eval_data": str(image_folder), "output_dir": str(tmp_path / "out"),
        "image_size": 32, "max_steps": 2, "warmup_steps": 0, "gan_start_step": 0, "discriminator_start_step": 0,
        "discriminator_warmup_steps": 0, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4, "dataloader_num_workers": 0, "logging_steps": 1, "eval_steps": 2,
        "save_steps": 2, "report_to": "none", "use_cpu": True, "max_eval_samples": 2,
    }  # fmt: skip
    if "encoder_name_or_path" in options or recipe.stem == "vqrae_dinov2_small_stage1":
        tiny["encoder_name_or_path"] = str(tiny_networks / "encoder")
    if "model_name_or_path" in options:
        tiny["model_name_or_path"] = str(tiny_networks / ("fitted" if "token_passes" in options else "stage1"))
    else:
        tiny["model_config"] = json.dumps(fields)
    if options.get("discriminator") == "dino":
        tiny["discriminator_name_or_path"] = str(tiny_networks / "vit")
    flags = [text for name, value in tiny.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train_hf.py", str(recipe), *flags])
    train_hf.main()
    state = json.loads(Path(tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    logged = {name.removeprefix("loss_") for name in state["log_history"][0] if name.startswith("loss_")}
    assert asked_for - {"distillation"} <= logged
    assert ("distillation" in logged) == (options.get("stage") == 2)
    assert ("discriminator" in logged) == ("gan" in asked_for)
    rates = {name for name in state["log_history"][0] if name.startswith("learning_rate_")}
    trains_encoder = options.get("stage") == 2 or not options.get("model_config", {}).get("freeze_encoder", True)
    assert ("learning_rate_encoder" in rates) == trains_encoder
