"""Tiny models and images; no downloads."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from PIL import Image

from configuration_simvq import VQRAEConfig
from modeling_simvq import VQRAEModel


ENCODERS = {
    "siglip_vision_model": {},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 4},
    "dinov3_vit": {"num_register_tokens": 4},
    "vit_mae": {},
    "clip_vision_model": {},
    "vit": {},
    "internvl_vision": {"image_size": [32, 32], "patch_size": [8, 8]},
}


def encoder_config(model_type: str = "dinov2", **overrides) -> dict:
    """32 px, patch 8: a grid of 4 x 4."""
    config = {"model_type": model_type, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"image_size": 32, "patch_size": 8, "intermediate_size": 64} | ENCODERS[model_type] | overrides
    if "mlp_ratio" in config:
        del config["intermediate_size"]
    return config


def tiny_config(model_type: str = "dinov2", **overrides) -> VQRAEConfig:
    fields = {"encoder_config": encoder_config(model_type), "image_size": 32, "decoder_patch_size": 8}
    return VQRAEConfig(**{**fields, "codebook_size": 64, **overrides})


@pytest.fixture
def tiny_model():
    torch.manual_seed(0)
    return VQRAEModel(tiny_config())


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def image_folder(tmp_path):
    """12 images of 4 sources."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for source in "abcd":
        for number in range(3):
            noise = torch.randint(0, 256, (6, 8, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(noise.numpy()).resize((48, 40)).save(folder / f"{source}-{number}.png")
    return folder
