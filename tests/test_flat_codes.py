"""Codes that images do not use are given to flat colours."""

import sys

import pytest
import torch
from conftest import tiny_config
from PIL import Image
from safetensors.torch import load_file
from test_fused_latents import FUSED, smooth_images

from checkpoints import flat_codes
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from reading.models import load_pretrained


pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A fused tokenizer fitted to pale images, and a folder of these; the converted one after `convert()`."""
    torch.manual_seed(0)
    pale = 0.5 + (smooth_images(16) - 0.5) / 2
    model = VQRAEModel(tiny_config(**FUSED, decoder_linear_path=3)).eval()
    model.initialize_codebook(pale.split(8))
    model.save_pretrained(tmp_path / "pale")
    VQRAEImageProcessor.for_image_size(32).save_pretrained(tmp_path / "pale")
    (tmp_path / "images").mkdir()
    for number, image in enumerate(pale):
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")

    def convert(levels: int = 2) -> None:
        options = ["--model_name_or_path", str(tmp_path / "pale"), "--data", str(tmp_path / "images")]
        options += ["--levels", str(levels), "--output_dir", str(tmp_path / "colours")]
        monkeypatch.setattr(sys, "argv", ["flat_codes.py", *options])
        flat_codes.main()

    return tmp_path, convert


def test_the_rarest_codes_become_latents_of_colours_and_no_other_weight_changes(folders):
    folder, convert = folders
    convert()
    model = load_pretrained(str(folder / "pale"), {}).eval()
    counts, images = flat_codes.counts_of(model, str(folder / "images"), 700)
    before, after = (load_file(folder / name / "model.safetensors") for name in ("pale", "colours"))
    changed = (before[flat_codes.ROWS] != after[flat_codes.ROWS]).any(1)
    assert images == 16 and counts.sum() == 16 * 16 and changed.sum() == 8
    assert counts[changed].max() <= counts[~changed].min()
    for name in before.keys() - {flat_codes.ROWS}:
        assert torch.equal(before[name], after[name])
    # each colour of the lattice, as a picture, is now at its own code, and was at another one
    converted = load_pretrained(str(folder / "colours"), {}).eval()
    pictures = flat_codes.lattice(2)[:, :, None, None].expand(-1, -1, 112, 112).contiguous()
    latents = converted.get_latents(pictures).mean(1)
    codes = converted.quantizer(latents[None])[2].flatten()
    assert codes.unique().numel() == 8 and changed[codes].all()
    assert torch.allclose(converted.quantizer.get_codebook_entry(codes), latents, atol=1e-3)


def test_flat_colours_come_back_nearer(folders):
    folder, convert = folders
    convert()
    pictures = flat_codes.lattice(2)[:, :, None, None].expand(-1, -1, 32, 32).contiguous()
    errors = []
    for name in ("pale", "colours"):
        model = load_pretrained(str(folder / name), {}).eval()
        errors.append((model(pictures).decoded_pixel_values - pictures).abs().mean().item())
    assert errors[1] < 0.7 * errors[0]


def test_more_colours_than_half_of_the_codes_are_refused_and_nothing_is_written(folders, capsys):
    folder, convert = folders
    with pytest.raises(SystemExit):
        convert(levels=3)
    assert "27 colours are more than half of the codes" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"pale", "images"}
