"""Metrics of pixels and tokens against independent implementations, and as modules of evaluate."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import MeanColors
from PIL import Image
from skimage import data as photographs
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from test_frechet import features
from test_loading import ROOT

from eval.blocking.blocking import blocking_of, count_steps
from eval.codebook_usage.codebook_usage import codebook_statistics, count_codes
from eval.evaluation import Evaluation, Networks
from eval.metrics import to_uint8
from eval.protocol import Protocol
from eval.psnr.psnr import psnr_per_image
from eval.rfid.rfid import InceptionV3, Moments, frechet_distance
from eval.ssim.ssim import ms_ssim_per_image, ssim_per_image


ASSETS = pytest.mark.skipif("VQRAE_ASSETS" not in os.environ, reason="VQRAE_ASSETS is not set: no LPIPS weights")


def test_psnr_and_ssim_agree_with_scikit_image(pair):
    real, fake = (x / 255 for x in pair)
    arrays = [x.permute(0, 2, 3, 1).double().numpy() for x in (real, fake)]
    for i, (a, b) in enumerate(zip(*arrays)):
        assert psnr_per_image(fake, real)[i].item() == pytest.approx(
            peak_signal_noise_ratio(a, b, data_range=1), abs=1e-6
        )
        uniform = structural_similarity(a, b, data_range=1, channel_axis=2)
        assert ssim_per_image(fake, real, "uniform")[i].item() == pytest.approx(uniform, abs=1e-6)
        gaussian = structural_similarity(
            a, b, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )[1].mean()  # borders included, as torchmetrics does
        assert ssim_per_image(fake, real)[i].item() == pytest.approx(gaussian, abs=1e-3)
    assert psnr_per_image(real, real).isinf().all()
    with pytest.raises(ValueError, match="gaussian"):
        ssim_per_image(fake, real, "box")


def test_ms_ssim_agrees_with_the_formula():
    """Five scales by 2 x 2 means; contrast and structure of the first four, all of SSIM of the last; no borders."""
    from scipy.ndimage import gaussian_filter

    real = photographs.astronaut()[100:292, 100:292] / 255
    fake = (real + np.random.default_rng(0).normal(size=real.shape) * 0.1).clip(0, 1)
    weights, parts, x, y = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), [], real, fake
    for scale in range(5):

        def blurred(image):
            return gaussian_filter(image, (1.5, 1.5, 0), truncate=3.5, mode="mirror")

        mx, my = blurred(x), blurred(y)
        vx, vy, cov = blurred(x * x) - mx**2, blurred(y * y) - my**2, blurred(x * y) - mx * my
        contrast = (2 * cov + 0.03**2) / (vx + vy + 0.03**2)
        luminance = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
        inner = contrast[5:-5, 5:-5].mean() if scale < 4 else (contrast * luminance).mean()
        parts.append(max(inner, 0) ** weights[scale])
        x, y = (z.reshape(z.shape[0] // 2, 2, z.shape[1] // 2, 2, 3).mean((1, 3)) for z in (x, y))
    pair = (torch.from_numpy(z).permute(2, 0, 1)[None] for z in (fake, real))
    assert ms_ssim_per_image(*pair).item() == pytest.approx(np.prod(parts), abs=1e-3)


def test_codebook_statistics_against_a_count():
    codes = torch.tensor([[0, 0, 5], [1, 1, 0]])
    counts = count_codes(codes, 8)
    statistics = codebook_statistics(counts)
    numbers = [codes.flatten().tolist().count(code) for code in range(8)]
    shares = [number / 6 for number in numbers if number]
    entropy = -sum(share * np.log(share) for share in shares)
    assert counts.tolist() == numbers
    assert statistics["codebook_utilization"] == 3 / 8 and statistics["codebook_tokens"] == 6
    assert statistics["codebook_perplexity"] == pytest.approx(np.exp(entropy))
    assert statistics["codebook_entropy"] == pytest.approx(entropy / np.log(2))
    with pytest.raises(ValueError, match=r"\[0, 4\), got 0 to 5"):
        count_codes(codes, 4)


@ASSETS
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_agrees_with_the_lpips_package(pair, net):
    package = pytest.importorskip("lpips")
    from eval.lpips.lpips import load_lpips

    real, fake = (x / 255 for x in pair)
    with torch.no_grad():
        expected = package.LPIPS(net=net, verbose=False)(real * 2 - 1, fake * 2 - 1).flatten()
        ours = load_lpips(net)(fake, real, normalize=True).flatten()
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_rounding_never_wraps():
    assert to_uint8(torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.02])).tolist() == [0, 0, 128, 255, 255]


def test_metrics_are_modules_of_evaluate(pair, inception_weights, tmp_path, monkeypatch):
    """Loaded from a folder where nothing else of this repository is, by name, on images of several sizes."""
    import evaluate as library

    names_of_modules = ("rfid", "lpips", "psnr", "ssim", "blocking", "codebook_usage", "semantic_agreement")
    for name in names_of_modules:
        shutil.copytree(ROOT / "eval" / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    real, fake = ([Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images] for images in pair)
    real, fake = real + [real[0].resize((200, 180))], fake + [fake[0].resize((200, 180))]
    modules = {name: library.load(f"./{name}") for name in names_of_modules}
    expected = psnr_per_image(*(x / 255 for x in pair))
    result = modules["psnr"].compute(predictions=fake, references=real)
    assert result["scores"][:3] == pytest.approx(expected.tolist()) and len(result["scores"]) == 4
    for options in ({}, {"window": "uniform"}, {"multiscale": True}):
        some = slice(3, 4) if "multiscale" in options else slice(None)
        result = modules["ssim"].compute(predictions=fake[some], references=real[some], **options)
        assert 0 < next(iter(result.values())) < 1
    grid = modules["blocking"].compute(predictions=fake[:3], references=real[:3], patch_size=16)
    assert grid["blocking"] == blocking_of(*(count_steps(images, 16) for images in reversed(pair)))
    assert modules["blocking"].compute(predictions=real, references=real, patch_size=16)["blocking"] == 1
    usage = modules["codebook_usage"].compute(predictions=[0, 0, 1, 2], codebook_size=4)
    assert usage["codebook_utilization"] == 0.75 and usage["codebook_entropy"] == 1.5
    result = modules["rfid"].compute(predictions=fake, references=real, weights=str(inception_weights))
    assert result["num_images"] == 4 and result["rfid"] > 0
    same = modules["rfid"].compute(predictions=real, references=real, weights=str(inception_weights))
    assert same["rfid"] < 1e-3
    network = InceptionV3(torch.load(inception_weights, weights_only=True))
    moments = Moments(2048)
    for image in real:
        moments.update(network(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]))
    np.savez("real.npz", **dict(zip(("mu", "sigma"), (x.numpy() for x in moments.compute()))))
    known = modules["rfid"].compute(predictions=fake, reference_statistics="real.npz", weights=str(inception_weights))
    assert known["rfid"] == pytest.approx(result["rfid"], rel=1e-6)
    rows = [features(20, 4, seed).tolist() for seed in (1, 2)]
    distance = library.load("./rfid", "features").compute(predictions=rows[0], references=rows[1])
    (m1, s1), (m2, s2) = ((np.mean(x, 0), np.cov(x, rowvar=False)) for x in rows)
    assert distance["frechet_distance"] == pytest.approx(
        frechet_distance(*map(torch.from_numpy, (m1, s1, m2, s2))), rel=1e-9
    )
    agreement = modules["semantic_agreement"].compute(
        predictions=[[[1.0, 0.0], [0.0, 2.0]]], references=[[[3.0, 0.0], [1.0, 1.0]]]
    )
    assert agreement["scores"] == [pytest.approx((1 + 0.5**0.5) / 2)]
    if "VQRAE_ASSETS" in os.environ:
        lpips = modules["lpips"].compute(predictions=fake, references=real, net_type="alex")
        assert len(lpips["scores"]) == 4 and 0 < lpips["scores"][0] < lpips["scores"][2]
    with pytest.raises(ValueError, match="Image 0: a"):
        modules["psnr"].compute(predictions=fake[:1], references=[real[0].resize((64, 64))])
    with pytest.raises(ValueError, match="Image 0: a"):
        modules["blocking"].compute(predictions=fake[:1], references=[real[0].resize((64, 64))], patch_size=16)
    for name in modules:
        readme = (tmp_path / name / "README.md").read_text()
        assert readme.startswith("---") and "evaluate.load" in readme


@pytest.mark.parametrize("damage", ["jpeg", "blur"])
def test_more_damage_makes_every_metric_worse(damage, tmp_path):
    from PIL import ImageFilter

    files = [photographs.astronaut(), photographs.coffee(), photographs.chelsea(), photographs.rocket()]
    originals = [Image.fromarray(x).resize((192, 192)) for x in files]
    lpips = {}
    if "VQRAE_ASSETS" in os.environ:
        from eval.lpips.lpips import load_lpips

        lpips = {f"lpips_{net}": load_lpips(net) for net in ("alex", "vgg")}
    results = []
    for amount in (95, 75, 50, 20, 5) if damage == "jpeg" else (0.3, 0.8, 1.5, 3, 6):
        damaged = []
        for image in originals:
            if damage == "jpeg":
                image.save(tmp_path / "x.jpg", quality=amount)
                damaged.append(Image.open(tmp_path / "x.jpg").convert("RGB"))
            else:
                damaged.append(image.filter(ImageFilter.GaussianBlur(amount)))
        evaluation = Evaluation(Protocol.load("default"), Networks({"fd_colors": MeanColors()}, lpips))
        real, fake = (
            torch.from_numpy(np.stack([np.array(x) for x in images])).permute(0, 3, 1, 2)
            for images in (originals, damaged)
        )
        evaluation.update(0, [0, 1, 2, 3], real, fake / 255)
        evaluation.join()
        results.append(evaluation.compute()[0])
    for name in results[0]:
        values = [result[name] for result in results]
        assert values == sorted(values, reverse=name in ("psnr", "ssim", "ms_ssim")), (name, values)
        assert len(set(values)) == 5, (name, values)
