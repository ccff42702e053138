"""From images to tokens to a generator to new images."""

import json
import sys

import pytest
import torch
from generators import CLASSES, make_tokenizer, pictures, run_training, write_tokens
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from generation import sample


def run_sampling(monkeypatch, *arguments) -> None:
    """`python -m generation.sample`, in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *map(str, arguments)])
    sample.main()


def read(file) -> torch.Tensor:
    return pil_to_tensor(Image.open(file)) / 255


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder with a tokenizer, tokens of 40 images, and a generator that has learned them."""
    folder = tmp_path_factory.mktemp("learned")
    images, labels = pictures()
    tokenizer = make_tokenizer(folder / "tokenizer")
    tokens = tokenizer.get_image_tokens(images)
    write_tokens(folder / "tokens", tokens[:, None], tokenizer, folder / "tokenizer", labels)
    with pytest.MonkeyPatch.context() as patch:
        run_training(
            patch, "--train_data", folder / "tokens", "--output_dir", folder / "generator", "--max_steps", 150,
            "--learning_rate", 3e-3, "--num_pictures", 4,
        )  # fmt: skip
    return folder


def test_new_images_are_of_their_classes(learned, tmp_path, monkeypatch):
    """Of 40 images of 4 classes: each new one is nearest to images of the class that was asked for."""
    run_sampling(
        monkeypatch, "--model_name_or_path", learned / "generator", "--num_images", 12, "--batch_size", 5,
        "--output_dir", tmp_path, "--guidance_scale", 1.5, "--temperature", 0.5,
    )  # fmt: skip
    images, labels = pictures()
    made = json.loads((tmp_path / "samples.json").read_text())
    for number, entry in enumerate(made["images"]):
        distances = (images - read(tmp_path / entry["file"])).square().mean((1, 2, 3))
        assert CLASSES[labels[distances.argmin()]] == entry["condition"] == CLASSES[number % 4]
        assert distances.min() < 0.02
    assert (learned / "generator" / "samples" / "step-0000150.png").exists()
    metrics = json.loads((learned / "generator" / "eval_results.json").read_text())
    assert metrics["eval_loss"] < metrics["eval_loss_bigram"] < metrics["eval_loss_unigram"]
    assert len((tmp_path / "grid.png").read_bytes()) > 0
