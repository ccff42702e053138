"""The code in the documentation runs."""

import re

import pytest
import torch
from conftest import tiny_config
from PIL import Image
from test_loading import ROOT, run

from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from reading.sources import find_images


def blocks(path: str, language: str = "python") -> list[str]:
    """Code blocks of a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / path).read_text(), flags=re.M | re.S)


def test_files_that_documents_name_are_there():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("checkpoints/*.md")]:
        named = set(
            re.findall(
                r"(?<![\w/])(?:checkpoints|configs|docs|eval|examples|benchmarks|convert|reading|training)/[\w/.-]*\.(?:json|md|py|png|jpg|yaml)",
                document.read_text(),
            )
        )
        missing = [name for name in named if not (ROOT / name).exists()]
        assert not missing, (document.name, missing)


def test_downstream_snippets(tmp_path, image_folder):
    torch.manual_seed(0)
    VQRAEModel(tiny_config(codebook_dim=8, encoder_layers=[1, 2])).save_pretrained(tmp_path / "my-tokenizer")
    VQRAEImageProcessor.for_image_size(32).save_pretrained(tmp_path / "my-tokenizer")
    image_folder.rename(tmp_path / "my_images")
    code = blocks("docs/downstream.md")
    assert len(code) == 7
    checks = """
assert inputs_embeds.shape == (2, 16, 64)
ids = to_ids(tokens)
assert ids.shape == (2, 18) and ids.max() == end == vocabulary - 1 and ids[:, 1:-1].min() >= words
assert tokenized[0]["grid"] == [4, 4] and len(tokenized) == 12 and len(tokenized[0]["tokens"]) == 16
assert (reconstruct(pixels) - pixels).abs().max() < 1
"""
    run("\n".join(code) + checks, tmp_path, HF_HOME=str(tmp_path / "home"))
    assert (tmp_path / "my-fine-tuned" / "model.safetensors").exists()


@pytest.mark.parametrize("block", range(2))
def test_readme_snippets(block, tmp_path, monkeypatch):
    """Those under "Use it", with a tiny model in place of the checkpoint."""
    torch.manual_seed(0)
    VQRAEModel(tiny_config()).save_pretrained(tmp_path / "checkpoints" / "vqrae-dinov2-small")
    VQRAEImageProcessor.for_image_size(32).save_pretrained(tmp_path / "checkpoints" / "vqrae-dinov2-small")
    (tmp_path / "examples" / "images").mkdir(parents=True)
    image = Image.open(find_images(ROOT / "examples" / "images")[0]).convert("RGB")
    image.save(tmp_path / "examples" / "images" / "astronaut.jpg")
    run(blocks("README.md")[block], tmp_path, PYTHONPATH=str(ROOT), HF_HOME=str(tmp_path / "home"))
