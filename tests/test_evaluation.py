import json
import os

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from test_loading import ROOT, run

from eval.images import find_images
from eval.metrics import CodebookUsage, pixel_metrics, to_uint8
from eval.pictures import save_rows
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel


def test_psnr_and_ssim_agree_with_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(3, 3, 8, 8, generator=generator), 64, mode="bilinear")
    y = (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    y[1] = x[1] + 0.01  # images of very different error: pooling over pixels would show
    metrics = pixel_metrics()
    metrics.update(y, x)
    pairs = [(a.permute(1, 2, 0).double().numpy(), b.permute(1, 2, 0).double().numpy()) for a, b in zip(x, y)]
    psnr = np.mean([skimage.peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs])
    ssim = np.mean(
        [
            skimage.structural_similarity(
                a,
                b,
                data_range=1,
                channel_axis=2,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                full=True,
            )[1].mean()  # borders included, as torchmetrics does
            for a, b in pairs
        ]
    )
    values = metrics.compute()
    assert values["psnr"].item() == pytest.approx(psnr, abs=1e-4)
    assert values["ssim"].item() == pytest.approx(ssim, abs=1e-3)


def test_codebook_usage_over_batches():
    usage = CodebookUsage(8)
    usage.update(torch.tensor([[0, 0], [1, 1]]))
    usage.update(torch.tensor([[2, 2, 3, 3]]))
    result = usage.compute()
    assert result["codebook_utilization"] == 0.5 and result["codebook_tokens"] == 8
    assert result["codebook_perplexity"] == pytest.approx(4)


def test_rounding_never_wraps():
    assert to_uint8(torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.02])).tolist() == [0, 0, 128, 255, 255]


def test_pictures_show_originals_above_reconstructions(tmp_path):
    save_rows([torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8) / 2], tmp_path / "a" / "p.png", columns=2)
    picture = np.asarray(Image.open(tmp_path / "a" / "p.png"))
    assert [picture[2 + 10 * row + 4, 6, 0] for row in range(4)] == [0, 128, 0, 128]
    assert picture[36, 16, 0] == 255
    assert os.listdir(tmp_path / "a") == ["p.png"]


def test_script_measures_a_folder(tmp_path, image_folder):
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config()).eval()
    model.save_pretrained(tmp_path / "model")
    processor = VQRAEImageProcessor.for_image_size(32)
    processor.save_pretrained(tmp_path / "model")
    output = run(
        [
            str(ROOT / "eval" / "reconstruction.py"),
            "--model_name_or_path",
            "model",
            "--data",
            str(image_folder),
            "--output_dir",
            "results",
            "--batch_size",
            "5",
            "--inception_weights",
            "missing.pth",
        ],
        tmp_path,
        TORCH_HOME=str(tmp_path / "no weights here"),
        http_proxy="http://127.0.0.1:9",
        https_proxy="http://127.0.0.1:9",
    )
    result = json.loads((tmp_path / "results" / "results.json").read_text())
    pixels = processor([Image.open(f) for f in find_images(image_folder)], return_tensors="pt").pixel_values
    with torch.no_grad():
        reference = model(pixels)
    expected = pixel_metrics()
    expected.update(to_uint8(reference.decoded_pixel_values) / 255, to_uint8(pixels) / 255)
    for name, value in expected.compute().items():
        assert result["metrics"][name] == pytest.approx(value.item(), abs=1e-4)
    assert result["metrics"]["codebook_utilization"] == len(reference.image_tokens.unique()) / 64
    assert result["num_images"] == 12
    for name in ("rfid", "lpips_alex", "lpips_vgg"):  # null, with the reason and the way out
        assert result["metrics"][name] is None
        assert "not available" in result["not_computed"][name]
        assert name in output
    assert "--inception_weights" in result["not_computed"]["rfid"]
    assert sorted(os.listdir(tmp_path / "results")) == ["pictures.png", "results.json", "results.md"]


@pytest.mark.skipif("VQRAE_ASSETS" not in os.environ, reason="VQRAE_ASSETS is not set: no LPIPS weights")
def test_script_computes_lpips_where_there_are_weights(tmp_path, image_folder):
    VQRAEModel(tiny_config(image_size=64, decoder_patch_size=16)).save_pretrained(tmp_path / "model")
    VQRAEImageProcessor.for_image_size(64).save_pretrained(tmp_path / "model")
    run(
        [
            str(ROOT / "eval" / "reconstruction.py"),
            "--model_name_or_path",
            "model",
            "--data",
            str(image_folder),
            "--output_dir",
            "results",
            "--inception_weights",
            "missing.pth",
        ],
        tmp_path,
    )
    metrics = json.loads((tmp_path / "results" / "results.json").read_text())["metrics"]
    assert metrics["lpips_alex"] > 0 and metrics["lpips_vgg"] > 0


def test_rfid_is_computed_where_there_are_weights(tmp_path, image_folder):
    """Random Inception weights: the value means nothing, the path is the real one."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    from eval.images import load_images
    from eval.reconstruction import Collate, build_network_metrics, evaluate

    torch.manual_seed(0)
    # the network's own layers, built without asking for weights
    weights = tmp_path / "inception.pth"
    original = torch.load
    try:
        torch.load = lambda *args, **kwargs: {}
        load_state = torch.nn.Module.load_state_dict
        torch.nn.Module.load_state_dict = lambda *args, **kwargs: None
        weights.write_bytes(b"")
        network = fidelity.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=weights)
    finally:
        torch.load = original
        torch.nn.Module.load_state_dict = load_state
    torch.save(network.state_dict(), weights)
    metrics, reasons = build_network_metrics(["rfid"], str(weights), torch.device("cpu"))
    assert list(metrics) == ["rfid"] and set(reasons) == {"lpips_alex", "lpips_vgg"}
    model = VQRAEModel(tiny_config()).eval()
    loader = torch.utils.data.DataLoader(
        load_images(str(image_folder)), 4, collate_fn=Collate(VQRAEImageProcessor.for_image_size(32))
    )
    values, psnrs = evaluate(model, loader, {"rfid": metrics["rfid"]})
    assert values["rfid"] > 0 and len(psnrs) == 12
