"""The whole command: what is measured, on what, and what is told."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from skimage import data as photographs
from test_loading import run

from eval import reference_statistics
from eval.crops import CroppedImages, collate_images
from eval.metrics import to_uint8
from eval.protocol import Protocol, names
from eval.psnr.psnr import psnr_per_image
from eval.reconstruction import ModelReconstruction
from eval.ssim.ssim import ssim_per_image
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from reading.files import dataset_of_files, find_images


ASSETS = pytest.mark.skipif("VQRAE_ASSETS" not in os.environ, reason="VQRAE_ASSETS is not set: no LPIPS weights")


def test_script_measures_a_model_on_a_folder(tmp_path, image_folder, saved_model):
    (tmp_path / "model" / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Mine\n")
    (image_folder / "broken.png").write_bytes(b"no image")
    output = run(
        ["-m", "eval.reconstruction", "--model_name_or_path", "model", "--data", str(image_folder),
         "--output_dir", "results", "--batch_size", "5", "--update_model_card"],
        cwd=tmp_path, TORCH_HOME=str(tmp_path / "no weights here"),
        http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9",
    )  # fmt: skip
    result = json.loads((tmp_path / "results" / "results.json").read_text())
    files = [file for file in find_images(image_folder) if file.name != "broken.png"]
    crops = np.stack([Protocol.load("default").crop(Image.open(file), 32) for file in files])
    pixels = torch.from_numpy(crops).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = saved_model(pixels)
        rounded = to_uint8(expected.decoded_pixel_values) / 255
        again = saved_model.get_image_features(rounded).last_hidden_state
    cosine = torch.nn.functional.cosine_similarity(again, expected.last_hidden_state, dim=-1).mean()
    metrics = result["metrics"]
    assert metrics["psnr"] == pytest.approx(psnr_per_image(rounded, pixels).mean().item(), abs=1e-4)
    assert metrics["ssim"] == pytest.approx(ssim_per_image(rounded, pixels).mean().item(), abs=1e-5)
    assert metrics["semantic_agreement"] == pytest.approx(cosine.item(), abs=1e-4)
    assert metrics["codebook_utilization"] == len(expected.image_tokens.unique()) / 64
    assert result["num_images"] == 12 and "broken.png" in result["skipped_images"][0] and "Left out" in output
    for name in ("rfid", "lpips_alex", "lpips_vgg"):  # null, with the reason and the way out
        assert metrics[name] is None
        assert "not available" in result["not_computed"][name]
        assert name in output
    assert "--inception_weights" in result["not_computed"]["rfid"]
    expected_files = ["code_counts.npy", "pictures.png", "report.html", "results.json", "results.md"]
    assert sorted(os.listdir(tmp_path / "results")) == expected_files
    counts = torch.bincount(expected.image_tokens.flatten(), minlength=64)
    assert np.load(tmp_path / "results" / "code_counts.npy").tolist() == counts.tolist()
    page = (tmp_path / "results" / "report.html").read_text()
    assert page.count("data:image/png") == 3 and "<svg" in page and 'src="http' not in page
    assert result["schema_version"] == 1 and result["source"]["weights_sha256"]
    assert {"torch", "pillow", "transformers"} <= result["versions"].keys()
    from huggingface_hub import ModelCard

    card = ModelCard.load(tmp_path / "model" / "README.md")
    values = {entry.metric_type: entry.metric_value for entry in card.data.eval_results}
    assert values["psnr"] == metrics["psnr"] and "rfid" not in values and "# Mine" in card.text


@ASSETS
def test_script_computes_what_there_are_weights_for(command, tmp_path, image_folder, inception_weights):
    VQRAEModel(tiny_config(image_size=64, decoder_patch_size=16)).save_pretrained(tmp_path / "model")
    VQRAEImageProcessor.for_image_size(64).save_pretrained(tmp_path / "model")
    output = command(
        "--model_name_or_path", "model", "--data", image_folder, "--output_dir", "results",
        "--inception_weights", inception_weights, "--features", os.environ["VQRAE_ASSETS"] + "/dinov2-small",
    )  # fmt: skip
    result = json.loads((tmp_path / "results" / "results.json").read_text())
    assert all(result["metrics"][name] > 0 for name in ("lpips_alex", "lpips_vgg", "rfid", "fd_dinov2-small"))
    assert not result["not_computed"] and result["networks"].keys() >= {"rfid", "fd_dinov2-small"}
    assert sum("fewer than its" in text for text in result["warnings"]) == 2
    assert "biased upwards" in output


def test_folders_are_compared_and_equal_ones_are_perfect(command, tmp_path, image_folder, inception_weights):
    command(
        "--real", image_folder, "--fake", image_folder, "--output_dir", "same", "--image_size", 32,
        "--network_metrics", "rfid", "--inception_weights", inception_weights,
    )  # fmt: skip
    result = json.loads((tmp_path / "same" / "results.json").read_text())
    assert result["metrics"]["rfid"] < 1e-3 and result["metrics"]["ssim"] == pytest.approx(1)
    assert (
        result["metrics"]["psnr"] is None
        and result["not_computed"]["psnr"] == "infinite: 12 of 12 equal their original"
    )
    fakes = tmp_path / "fakes"
    shutil.copytree(image_folder, fakes)
    for file in list(fakes.iterdir())[1:]:
        Image.open(file).resize((40, 30)).save(file)
    (fakes / "a-0.png").unlink()
    error = command("--real", image_folder, "--fake", fakes, "--output_dir", "out", "--network_metrics", fails=True)
    assert "1 image of" in error and "'a-0'" in error
    Image.new("RGB", (48, 40)).save(fakes / "a-0.jpg")
    error = command(
        "--real", image_folder, "--fake", fakes, "--output_dir", "out", "--network_metrics", "--image_size", 32,
        fails=True,
    )  # fmt: skip
    assert "is (40, 30) px, its original (48, 40)" in error


def test_any_function_is_measured_and_a_wrong_size_is_named(command, tmp_path, image_folder, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "darkened.py").write_text(
        "def darker(pixels):\n    return pixels * 0.5\n\n\ndef smaller(pixels):\n    return pixels[..., :16]\n"
    )
    options = ["--data", image_folder, "--output_dir", "out", "--image_size", 32, "--network_metrics"]
    command("--callable", "darkened:darker", *options)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["metrics"]["psnr"] < 15 and "codebook_utilization" not in result["metrics"]
    (tmp_path / "theirs8.py").write_text("def levels(pixels):\n    return pixels * 255\n")
    assert "pixels of reconstructions are below -0.25 or above 1.25" in command(
        "--callable", "theirs8:levels", *options
    )
    for name, message in (
        ("smaller", "must give images of the size"),
        ("missing", "cannot be imported"),
    ):
        error = command("--callable", f"darkened:{name}", *options, fails=True)
        assert message in error


def test_bad_arguments_and_data_are_named(command, tmp_path, image_folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no image")
    function = ["--callable", "torch:clone", "--output_dir", "out", "--network_metrics"]
    for arguments, message in (
        ([*function, "--data", empty, "--image_size", 32], "No images in"),
        ([*function, "--data", broken, "--image_size", 32], "none of them could be read"),
        ([*function, "--data", image_folder], "--callable needs --image_size"),
        (
            [*function, "--data", image_folder, "--image_size", 32, "--dtype", "bfloat16"],
            "are for --model_name_or_path",
        ),
        ([*function, "--data", image_folder, "--image_size", 32, "--inception_weights", "no.pth"], "no file no.pth"),
        ([*function, "--data", image_folder, "--protocol", "rae-256", "--image_size", 32], "is for 256 px"),
        (["--data", image_folder, "--output_dir", "out"], "pass one of"),
        (["--real", image_folder, "--output_dir", "out"], "pass one of"),
        ([*function, "--data", image_folder, "--image_size", 32, "--protocol", "adm"], "No protocol 'adm'"),
    ):
        error = command(*arguments, fails=True)
        assert message in error
    Image.new("RGB", (20, 20)).save(image_folder / "z.png")
    error = command(
        "--real", image_folder, "--fake", image_folder, "--output_dir", "out", "--network_metrics", fails=True
    )
    assert "different sizes" in error
    assert not (tmp_path / "out" / "results.json").exists()


def test_images_of_different_sizes_are_told_in_whatever_batches_they_are(command, tmp_path, image_folder):
    Image.new("RGB", (20, 20)).save(image_folder / "z.png")
    folders = ["--real", image_folder, "--fake", image_folder, "--network_metrics", "--output_dir", "out"]
    assert "(40, 48) and (20, 20) px: pass --image_size" in command(*folders, "--batch_size", 12, fails=True)


def test_pairs_of_the_same_name_are_not_guessed(command, tmp_path, image_folder):
    Image.new("RGB", (48, 40)).save(image_folder / "a-0.jpg")
    folders = ["--real", image_folder, "--fake", image_folder, "--network_metrics", "--output_dir", "out"]
    assert "have the same name" in command(*folders, fails=True)


def test_images_whose_reconstruction_is_not_finite_are_left_out_and_named(command, tmp_path, image_folder, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "overflowing.py").write_text("""
def dark(pixels):
    return pixels * 0.5

def darker(pixels):  # the pictures of one colour are too much for it
    pixels = pixels * 0.5
    flat = pixels.flatten(2).std(2).amax(1) == 0
    pixels[flat, 1, 2, 3] = float("inf")
    return pixels
""")
    options = ["--data", image_folder, "--image_size", 32, "--network_metrics", "--batch_size", 5]
    command("--callable", "overflowing:dark", *options, "--output_dir", "without")
    for name in ("a-9.png", "d-9.png"):
        Image.new("RGB", (40, 40), (9, 200, 30)).save(image_folder / name)
    (image_folder / "b-9.png").write_bytes(b"no image")
    output = command("--callable", "overflowing:darker", *options, "--output_dir", "with")
    expected, result = (json.loads((tmp_path / x / "results.json").read_text()) for x in ("without", "with"))
    assert result["metrics"] == {name: pytest.approx(value) for name, value in expected["metrics"].items()}
    assert result["num_images"] == 12 and result["num_not_finite"] == 2 and expected["num_not_finite"] == 0
    assert result["data"]["pixels_sha256"] == expected["data"]["pixels_sha256"]
    named = sorted(Path(text.split(": ")[0]).name for text in result["skipped_images"] if "NaN or infinity" in text)
    assert named == ["a-9.png", "d-9.png"] and len(result["skipped_images"]) == 3
    table = (tmp_path / "with" / "results.md").read_text()
    for text in (table, output):
        assert "- 1 image could not be read and was left out." in text
        assert "- 2 images were left out because numbers of the model were not finite" in text
    assert output.count("Left out: ") == 3
    for file in image_folder.glob("*-[0-8].png"):
        file.unlink()
    error = command("--callable", "overflowing:darker", *options, "--output_dir", "none", fails=True)
    assert "or gave finite numbers" in error


def test_images_whose_latents_are_not_finite_are_left_out(tiny_model, pixels, monkeypatch):
    """Whether the model refuses the whole batch, as it does in eval mode, or gives all the rest of it."""
    tiny_model.eval()
    reconstruct = ModelReconstruction(tiny_model, semantic_agreement=True)
    pixels = torch.cat([pixels, pixels.flip(3)])
    expected = reconstruct(pixels)

    def broken(module, args, output):
        lost = (args[0] - pixels[1]).abs().flatten(1).amax(1) == 0
        return (output[0], output[1].masked_fill(lost.view(-1, 1, 1), float("nan")))

    def features(given, grid, **outputs):
        output = image_features(given, grid, **outputs)
        return broken(None, (given,), output)

    image_features = tiny_model._image_features
    monkeypatch.setattr(tiny_model, "_image_features", features)
    search = tiny_model.quantizer._search
    for refuses in (True, False):
        if not refuses:
            monkeypatch.setattr(tiny_model.quantizer, "_search", lambda flat: search(flat.nan_to_num()))
        reconstructions, tokens, scores = reconstruct(pixels)
        assert reconstructions.isfinite().flatten(1).all(1).tolist() == [True, False, True, True]
        rest = [0, 2, 3]
        torch.testing.assert_close(reconstructions[rest], expected[0][rest])
        assert torch.equal(tokens[rest], expected[1][rest])
        torch.testing.assert_close(scores["semantic_agreement"][rest], expected[2]["semantic_agreement"][rest])
        assert not reconstruct(pixels[1:2])[0].isfinite().any()  # alone
    with pytest.raises(ValueError, match="multiples of decoder_patch_size"):  # other errors stay what they are
        reconstruct(pixels[..., :17])


def test_nothing_but_pixels_is_computed_of_the_flat_colours(command, tmp_path, image_folder, saved_model, monkeypatch):
    """They are 125 images, more than many evaluations have: their semantic agreement would be thrown away."""
    features, seen = VQRAEModel.get_image_features, []
    monkeypatch.setattr(VQRAEModel, "get_image_features", lambda *args: seen.append(len(args[1])) or features(*args))
    command(
        "--model_name_or_path", "model", "--data", image_folder, "--network_metrics", "--output_dir", "out"
    )  # fmt: skip
    assert seen[0] == 12 and sum(seen) < 12 + 125
    assert "semantic_agreement" in json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]


def test_a_model_that_is_not_finite_on_some_images_is_measured_on_the_others(
    command, tmp_path, image_folder, saved_model
):
    with torch.no_grad():  # float16 ends at 65,504
        saved_model.encoder.embeddings.patch_embeddings.projection.weight[0, 0] = 5000
    saved_model.save_pretrained(tmp_path / "model")
    Image.new("RGB", (40, 40), (255, 255, 255)).save(image_folder / "white.png")
    for file in list(image_folder.glob("*.png")):
        if file.name != "white.png":  # red is about 0 once it is normalised
            Image.new("RGB", (40, 40), (128, int(file.stem[-1]), 9)).save(file)
    output = command(
        "--model_name_or_path", "model", "--data", image_folder, "--network_metrics", "--output_dir", "out",
        "--batch_size", 5, "--dtype", "float16",
    )  # fmt: skip
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["num_not_finite"] == 1 and result["num_images"] == 12 and "white.png" in result["skipped_images"][0]
    assert result["metrics"]["codebook_tokens"] == 12 * 16 and "white.png" in output
    assert result["metrics"]["flat_colours_error"] is None and result["metrics"]["psnr"] > 0


def test_bf16_and_a_reference_model_are_said_in_the_result(command, tmp_path, image_folder, saved_model):
    command(
        "--model_name_or_path", "model", "--data", image_folder, "--output_dir", "out", "--network_metrics",
        "--dtype", "bfloat16", "--reference_model", "model",
    )  # fmt: skip
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["source"]["dtype"] == "bfloat16" and result["source"]["reference_sha256"]
    assert 0.99 < result["metrics"]["feature_cosine"] < 1  # bf16 beside fp32


def test_numbers_are_of_float32_whatever_the_checkpoint_holds(command, tmp_path, image_folder, saved_model):
    saved_model.bfloat16().save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    options = ["--model_name_or_path", "model", "--reference_model", "model", "--data", image_folder]
    command(*options, "--network_metrics", "--output_dir", "out")
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    crops = [Protocol.load("default").crop(Image.open(file), 32) for file in find_images(image_folder)]
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        exact = to_uint8(saved_model.float()(pixels).decoded_pixel_values) / 255
        low = to_uint8(saved_model.bfloat16()(pixels.bfloat16()).decoded_pixel_values) / 255
    psnr, of_bfloat16 = (psnr_per_image(x, pixels).mean().item() for x in (exact, low))
    assert result["metrics"]["psnr"] == pytest.approx(psnr, abs=1e-5) and abs(psnr - of_bfloat16) > 1e-4
    assert result["metrics"]["feature_cosine"] == pytest.approx(1, abs=1e-6) and result["source"]["dtype"] == "float32"
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


def test_one_image_is_enough(command, tmp_path, image_folder, inception_weights):
    command(
        "--callable", "torch:clone", "--data", image_folder, "--output_dir", "out", "--image_size", 32,
        "--max_samples", 1, "--network_metrics", "rfid", "--inception_weights", inception_weights,
    )  # fmt: skip
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["num_images"] == 1 and result["metrics"]["rfid"] == pytest.approx(0, abs=1e-3)


def test_reference_statistics_stand_in_for_the_originals(
    command, tmp_path, image_folder, inception_weights, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    weights = ["--inception_weights", str(inception_weights)]
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", str(image_folder), "--image_size", "32", "--output_file", "reference.npz", *weights]
    monkeypatch.setattr(sys, "argv", ["reference_statistics.py", *arguments])
    reference_statistics.main()
    (tmp_path / "darkening.py").write_text("def darker(pixels):\n    return pixels * 0.5\n")
    values = []
    for name, extra in (("a", []), ("b", ["--reference_statistics", "reference.npz"])):
        command(
            "--callable", "darkening:darker", "--data", image_folder, "--image_size", 32, "--output_dir", name,
            "--network_metrics", "rfid", *weights, *extra,
        )  # fmt: skip
        values.append(json.loads((tmp_path / name / "results.json").read_text())["metrics"]["rfid"])
    assert values[0] > 0 and values[1] == pytest.approx(values[0], rel=1e-6)


def test_batches_leave_out_what_cannot_be_read(tmp_path, image_folder):
    (image_folder / "aa.png").write_bytes(b"")
    images = CroppedImages(dataset_of_files(find_images(image_folder)), Protocol.load("default"), 32)
    batch = collate_images([images[i] for i in range(5)])
    assert batch["index"] == [0, 1, 2, 4] and batch["original"].shape == (4, 3, 32, 32)
    assert batch["skipped"][0][0] == 3 and "aa.png" in batch["skipped"][0][1]


def test_modes_and_depths_are_measured(command, tmp_path):
    folder = tmp_path / "modes"
    folder.mkdir()
    color = Image.fromarray(photographs.astronaut()).resize((64, 48))
    grey = color.convert("L")
    for name, image in {
        "palette.png": color.convert("P"),
        "cmyk.jpg": color.convert("CMYK"),
        "alpha.png": color.convert("RGBA"),
        "grey.png": grey,
        "grey_alpha.png": grey.convert("LA"),
        "sixteen.png": Image.fromarray(np.asarray(grey).astype(np.uint16) * 257),
        "bilevel.png": color.convert("1"),
        "pixel.png": color.resize((1, 1)),
    }.items():
        image.save(folder / name)
    for protocol in names():
        size = [] if protocol != "default" else ["--image_size", 32]
        arguments = ["--protocol", protocol, *size, "--output_dir", protocol, "--network_metrics"]
        command("--callable", "torch:clone", "--data", folder, *arguments)
        result = json.loads((tmp_path / protocol / "results.json").read_text())
        assert result["num_images"] == 8 and not result["skipped_images"]
