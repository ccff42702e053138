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

    def convert(levels: int = 2, steps: int = 0, name: str = "colours") -> None:
        options = ["--model_name_or_path", str(tmp_path / "pale"), "--data", str(tmp_path / "images")]
        options += ["--levels", str(levels), "--steps", str(steps), "--output_dir", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["flat_codes.py", *options])
        flat_codes.main()

    return tmp_path, convert


def test_the_rarest_codes_become_latents_of_colours_and_no_other_weight_changes(folders):
    folder, convert = folders
    convert()
    model = load_pretrained(str(folder / "pale"), {}).eval()
    tokens = flat_codes.tokens_of(model, flat_codes.latents_of_images(model, str(folder / "images"), 700))
    counts = torch.bincount(tokens.flatten(), minlength=40)
    before, after = (load_file(folder / name / "model.safetensors") for name in ("pale", "colours"))
    changed = (before[flat_codes.ROWS] != after[flat_codes.ROWS]).any(1)
    assert tokens.shape == (16, 4, 4) and changed.sum() == 8
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


def test_the_decoder_alone_learns_to_paint_flat_colours_and_keeps_its_images(folders):
    folder, convert = folders
    convert()
    convert(steps=60, name="taught")
    flat = flat_codes.lattice(2)[:, :, None, None].expand(-1, -1, 32, 32).contiguous()
    errors, painted = [], []
    for name in ("pale", "colours", "taught"):
        model = load_pretrained(str(folder / name), {}).eval()
        with torch.no_grad():
            errors.append((model(flat).decoded_pixel_values - flat).abs().mean())
            tokens = flat_codes.tokens_of(model, flat_codes.latents_of_images(model, str(folder / "images"), 700))
            painted.append(model.decode(tokens).decoded_pixel_values)
    assert errors[2] < errors[1] < errors[0]
    assert (painted[0] - painted[2]).abs().mean() < 0.5 * painted[0].std()  # a fifth of the codes are new
    before, after = (load_file(folder / name / "model.safetensors") for name in ("colours", "taught"))
    others = {name for name in before if not torch.equal(before[name], after[name])}
    assert others and all(name.startswith("decoder.") for name in others)


def test_more_colours_than_half_of_the_codes_are_refused_and_nothing_is_written(folders, capsys):
    folder, convert = folders
    with pytest.raises(SystemExit):
        convert(levels=3)
    assert "27 colours are more than half of the codes" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"pale", "images"}
