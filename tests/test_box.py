"""The benchmark that puts a tokenizer beside others and beside codecs."""

import io
import json
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from benchmarks import box
from modeling_simvq import VQRAEModel


class Distance(torch.nn.Module):
    """In place of LPIPS, whose weights are not here."""

    def forward(self, a, b, normalize):
        return (a - b).abs().mean()


def test_a_codec_gives_the_best_that_fits_and_else_the_smallest():
    torch.manual_seed(0)
    image = torch.rand(3, 4, 4).mul(255).byte().repeat_interleave(16, 1).repeat_interleave(16, 2)
    for name, options in box.CODECS.items():
        sizes = []
        for quality in range(96):
            file = io.BytesIO()
            to_pil_image(image).save(file, quality=quality, **options)
            sizes.append(len(file.getvalue()))
        limit = sorted(sizes)[48]
        made, size = box.by_codec(image, limit, **options)
        assert made.shape == image.shape and size <= limit, name
        assert size >= sorted(sizes)[24], name
        assert box.by_codec(image, 10, **options)[1] == sizes[0], name


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_oracle_is_the_best_linear_map_from_codes_to_these_images(kernel_size):
    """numpy's least squares on the same images reach the same error, and no other map a smaller one."""
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config()).eval()
    images = torch.rand(400, 3, 32, 32).mul(64).add(96).byte()  # far from black and white: nothing is cut off
    patch = model.config.decoder_patch_size
    made = box.by_oracle(model, images, kernel_size)
    codes = model.quantizer.get_codebook_entry(model.get_image_tokens(images / 255)).permute(0, 3, 1, 2)
    inputs = torch.nn.functional.unfold(codes, kernel_size, padding=kernel_size // 2).transpose(1, 2).flatten(0, 1)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).detach().double().numpy()
    patches = (
        torch.nn.functional.unfold(images / 255, patch, stride=patch).transpose(1, 2).flatten(0, 1).double().numpy()
    )
    least = np.mean((inputs @ np.linalg.lstsq(inputs, patches, rcond=None)[0] - patches) ** 2)
    error = (made / 255 - images / 255).square().mean().item()
    assert least > 1e-4 and abs(error - least) < 0.01 * least + 2e-6  # rounding to 8 bits


def test_rows_are_measured_on_the_same_images_and_drawn(image_folder, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    for name, codes in (("box", 256), ("other", 16)):
        VQRAEModel(tiny_config(codebook_size=codes)).save_pretrained(tmp_path / name)
    monkeypatch.setattr(box, "load_lpips", lambda _: Distance())
    flags = ["--model_name_or_path", tmp_path / "box", "--others", f"another={tmp_path / 'other'}"]
    flags += ["--data", image_folder, "--max_images", "3", "--oracle", "3", "--output_dir", tmp_path / "out"]
    flags += ["--train_data", image_folder, "--minutes", "0.01"]
    monkeypatch.setattr(sys, "argv", ["box.py", *map(str, flags)])
    box.main()
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert list(rows) == ["the tokenizer", "another", "SimVQ's CNN", "its best linear map, 3 x 3 codes", "JPEG", "WebP"]
    tokens = (32 // tiny_config().decoder_patch_size) ** 2
    assert rows["SimVQ's CNN"]["bytes"] == tokens
    assert (rows["the tokenizer"]["bytes"], rows["another"]["bytes"]) == (tokens, tokens / 2)  # 8 and 4 bits
    assert (tmp_path / "out" / "table.md").read_text() in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "pictures.png") as picture:
        assert picture.height > 7 * 32
    monkeypatch.setattr(sys, "argv", ["box.py", *map(str, flags), "--others", "nameless"])
    with pytest.raises(SystemExit):
        box.main()
    assert "'nameless' must be NAME=FOLDER" in capsys.readouterr().err


def test_without_weights_lpips_is_left_out_and_a_line_names_the_file(image_folder, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    VQRAEModel(tiny_config()).save_pretrained(tmp_path / "box")

    def refuse(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("eval.lpips.lpips.LearnedPerceptualImagePatchSimilarity", refuse)
    flags = ["--model_name_or_path", tmp_path / "box", "--data", image_folder, "--max_images", "2"]
    monkeypatch.setattr(sys, "argv", ["box.py", *map(str, flags), "--output_dir", str(tmp_path / "out")])
    box.main()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert "https://download.pytorch.org/models/vgg16-397923af.pth into " in line and "alexnet" not in line
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.startswith("| | bytes an image | PSNR | blocking |\n| --- | ---: | ---: | ---: |\n")
    assert "LPIPS" not in table and table.count("\n| JPEG | ") == 1
