"""Metrics against independent implementations, protocols against the references' formulas, and the whole command."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity.feature_extractor_inceptionv3
import torch_fidelity.metric_fid
from conftest import tiny_config
from PIL import Image
from skimage import data as photographs
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from test_loading import ROOT, run

from eval import compare, reconstruction, reference_statistics
from eval.codebook_usage.codebook_usage import codebook_statistics, count_codes
from eval.crops import CroppedImages, collate_images
from eval.evaluation import Evaluation, Networks
from eval.metrics import to_uint8
from eval.pictures import save_rows
from eval.protocol import Protocol, names
from eval.psnr.psnr import psnr_per_image
from eval.reconstruction import ModelReconstruction, evaluate
from eval.results import choose
from eval.rfid.rfid import InceptionV3, Moments, frechet_distance, load_statistics
from eval.ssim.ssim import ms_ssim_per_image, ssim_per_image
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from reading.sources import dataset_of_files, find_images


ASSETS = pytest.mark.skipif("VQRAE_ASSETS" not in os.environ, reason="VQRAE_ASSETS is not set: no LPIPS weights")


@pytest.fixture(scope="module")
def pair():
    """Three photographs and noisy ones, (3, 3, 128, 128) of uint8; of very different error."""
    images = [
        photographs.astronaut()[:128, 100:228],
        photographs.coffee()[:128, :128],
        photographs.chelsea()[:128, :128],
    ]
    real = np.stack(images)
    noise = np.random.default_rng(0).normal(size=real.shape) * np.array([2, 20, 60]).reshape(-1, 1, 1, 1)
    fake = (real + noise).clip(0, 255).astype(np.uint8)
    return tuple(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for x in (real, fake))


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of random weights of torch-fidelity's network."""
    torch.manual_seed(0)
    reference = torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:  # its own layers, without weights
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        network = reference("inception", ["2048"], feature_extractor_weights_path=str(path))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # keeps activations at their size
    torch.save(network.state_dict(), path)
    return path


# Fréchet distance ----------------------------------------------------------------------------------------------------


def features(count: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(100).normal(size=(width, width)) / width**0.5
    return rng.normal(size=(count, width)) @ mixing + 0.1 * seed + rng.exponential(size=(count, width)) * 0.2


def test_frechet_distance_agrees_with_pytorch_fid_s_and_torch_fidelity_s_formula():
    a, b = features(500, 48, 1), features(300, 48, 2)
    moments = []
    for x in (a, b):
        moments.append(Moments(48))
        for part in np.array_split(x, 7):
            moments[-1].update(torch.from_numpy(part))
    ours = frechet_distance(*moments[0].compute(), *moments[1].compute())
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(s1 @ s2)  # pytorch-fid, and the SimVQ reference
    expected = (m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * np.trace(root.real)
    assert ours == pytest.approx(expected, rel=1e-6)
    fidelity = torch_fidelity.metric_fid.fid_statistics_to_metric(
        *(torch_fidelity.metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)), False
    )
    assert ours == pytest.approx(fidelity["frechet_inception_distance"], rel=1e-6)


def test_frechet_distance_agrees_with_pytorch_fid():
    pytorch_fid = pytest.importorskip("pytorch_fid.fid_score")
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (features(500, 48, 1), features(300, 48, 2)))
    ours = frechet_distance(*map(torch.from_numpy, (m1, s1, m2, s2)))
    assert ours == pytest.approx(pytorch_fid.calculate_frechet_distance(m1, s1, m2, s2), rel=1e-6)


def test_frechet_distance_agrees_with_clean_fid():
    cleanfid = pytest.importorskip("cleanfid.fid")
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (features(500, 48, 1), features(300, 48, 2)))
    ours = frechet_distance(*map(torch.from_numpy, (m1, s1, m2, s2)))
    assert ours == pytest.approx(cleanfid.frechet_distance(m1, s1, m2, s2), rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_fewer_images_than_features_give_a_real_distance(count):
    a, b = features(count, 64, 1), features(count, 64, 2)
    values = []
    for x, y in ((a, b), (a, a)):
        moments = Moments(64), Moments(64)
        for part, sums in zip((x, y), moments):
            sums.update(torch.from_numpy(part))
        values.append(frechet_distance(*moments[0].compute(), *moments[1].compute()))
    # of rank below `count`: the trace of the root by the small Gram matrix, exactly
    centred = [(x - x.mean(0)) / max(count - 1, 1) ** 0.5 for x in (a, b)]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((x**2).sum() for x in centred) - 2 * root
    assert values[0] == pytest.approx(expected, rel=1e-6)
    assert values[1] == pytest.approx(0, abs=1e-6)


def test_statistics_files_of_others_are_read_and_pickles_are_not(tmp_path):
    mean, covariance = np.zeros(3, np.float32), np.eye(3)
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((1, 2, 2, 3)), mu=mean, sigma=covariance, mu_s=mean)
    assert load_statistics(tmp_path / "adm.npz")[1].dtype == torch.float64
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((1, 2, 2, 3)))
    with pytest.raises(ValueError, match="no 'mu' and 'sigma'"):
        load_statistics(tmp_path / "images.npz")
    np.savez(tmp_path / "pickle.npz", mu=np.array([print], dtype=object), sigma=covariance)
    with pytest.raises(ValueError, match="allow_pickle"):
        load_statistics(tmp_path / "pickle.npz")
    np.savez(tmp_path / "shape.npz", mu=mean, sigma=np.eye(4))
    with pytest.raises(ValueError, match="do not fit"):
        load_statistics(tmp_path / "shape.npz")


def test_inception_gives_torch_fidelity_s_features(inception_weights, pair):
    reference = torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(inception_weights)
    )
    weights = torch.load(inception_weights, weights_only=True)
    with torch.no_grad():
        expected = reference(pair[0])[0]
        ours = InceptionV3(weights)(pair[0])
        double = InceptionV3(weights, dtype=torch.float64)(pair[0])
    assert expected.std() > 1e-3  # not a constant
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(double.float(), expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="not the weights of FID's Inception"):
        InceptionV3({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)})


def test_inception_gives_pytorch_fid_s_features(inception_weights, pair, monkeypatch):
    module = pytest.importorskip("pytorch_fid.inception")
    weights = torch.load(inception_weights, weights_only=True)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: weights)
    with torch.no_grad():
        expected = module.InceptionV3([3]).eval()(pair[0] / 255)[0].flatten(1)
        ours = InceptionV3(weights, "pytorch-fid")(pair[0] / 255)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


# Pixels, tokens ------------------------------------------------------------------------------------------------------


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

    names_of_modules = ("rfid", "lpips", "psnr", "ssim", "codebook_usage", "semantic_agreement")
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
    for name in modules:
        readme = (tmp_path / name / "README.md").read_text()
        assert readme.startswith("---") and "evaluate.load" in readme


# Protocols -----------------------------------------------------------------------------------------------------------


def test_protocols_crop_as_their_references_do(tmp_path):
    from torchvision import transforms

    image = Image.fromarray(photographs.astronaut()).resize((600, 517))

    def adm(image, size):  # the steps of guided-diffusion's center_crop_arr
        while min(*image.size) >= 2 * size:
            image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
        scale = size / min(*image.size)
        array = np.array(image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC))
        top, left = ((side - size) // 2 for side in array.shape[:2])
        return array[top : top + size, left : left + size]

    bilinear = transforms.Compose([transforms.Resize(128), transforms.CenterCrop((128, 128))])
    bicubic = transforms.InterpolationMode.BICUBIC
    bicubic = transforms.Compose([transforms.Resize(256, interpolation=bicubic), transforms.CenterCrop(256)])
    for name, expected in (
        ("simvq-128", np.array(bilinear(image))),
        ("titok-256", np.array(bicubic(image))),
        ("rae-256", adm(image, 256)),
    ):
        protocol = Protocol.load(name)
        assert np.array_equal(protocol.crop(image, protocol.image_size), expected), name
    transparent = Image.new("RGBA", (300, 300), (10, 20, 30, 0))
    assert Protocol.load("default").crop(transparent, 64).mean() == 255
    assert Protocol.load("titok-256").crop(transparent, 256)[0, 0].tolist() == [10, 20, 30]
    image.save(
        tmp_path / "turned.jpg",
        exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00",
    )
    turned = [
        CroppedImages(dataset_of_files([tmp_path / "turned.jpg"]), Protocol.load(name), None)[0]["original"].shape
        for name in ("default", "rae-256")
    ]
    assert [tuple(x) for x in turned] == [(3, 600, 517), (3, 517, 600)]


def test_simvq_s_protocol_is_its_evaluation_loop(pair):
    """PSNR and SSIM of evaluation.py, written out: truncated, pooled over a batch, averaged over batches."""
    protocol = Protocol.load("simvq-128")
    real, fake = pair[0], pair[1] / 255 + 0.003
    evaluation = Evaluation(protocol, Networks())
    batches = [slice(0, 2), slice(2, 3)]
    psnr, ssim = [], []
    for number, part in enumerate(batches):
        evaluation.update(number, list(range(3))[part], real[part], fake[part])
        x, y = (
            torch.from_numpy((real[part].numpy() / 127.5 - 1.0).astype(np.float32)),
            (fake[part] * 2 - 1).clamp(-1, 1),
        )
        x, y = (((z + 1) / 2 * 255.0).permute(0, 2, 3, 1).to(torch.uint8).numpy() for z in (x, y))
        x, y = (z.astype(np.float32) / 255.0 for z in (x, y))
        psnr.append(peak_signal_noise_ratio(x, y, data_range=1.0))
        ssim.append(np.mean([structural_similarity(b, a, data_range=1.0, channel_axis=-1) for a, b in zip(x, y)]))
    evaluation.join()
    metrics, _, _ = evaluation.compute()
    assert metrics["psnr"] == pytest.approx(np.mean(psnr), abs=1e-4)
    assert metrics["ssim"] == pytest.approx(np.mean(ssim), abs=1e-5)
    default = Evaluation(Protocol.load("default"), Networks())
    default.update(0, [0, 1, 2], real, fake)
    default.join()
    assert abs(default.compute()[0]["psnr"] - metrics["psnr"]) > 0.5


def test_rae_s_protocol_truncates_and_titok_s_does_not():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    between = levels / 255 + 0.7 / 255
    rae, titok, default = (
        Protocol.load(name).eight_bits(levels, between) for name in ("rae-256", "titok-256", "default")
    )
    assert torch.equal(rae[1], levels)
    assert torch.equal(titok[1], (levels.int() + 1).clamp_max(255).to(torch.uint8))
    assert torch.equal(default[1], titok[1])
    originals = Protocol.load("simvq-128").eight_bits(levels, levels / 255)[0]
    assert (originals != levels).sum() == 95  # what the JSON says
    # TiTok rounds and then truncates what it has rounded
    rounded = torch.round(between.clamp(0, 1) * 255.0) / 255.0
    assert torch.equal((rounded * 255).to(torch.uint8), titok[1])


def test_protocols_are_checked_and_own_ones_are_read(tmp_path):
    assert names() == ["default", "rae-256", "simvq-128", "titok-256"]
    own = json.loads((ROOT / "eval" / "protocols" / "default.json").read_text()) | {"name": "mine", "image_size": 64}
    (tmp_path / "mine.json").write_text(json.dumps(own))
    assert Protocol.load(str(tmp_path / "mine.json")).image_size == 64
    for change, message in (({"resize": "nearest"}, "resize is 'nearest'"), ({"psnr": "pooled over batches"}, "needs")):
        (tmp_path / "mine.json").write_text(json.dumps(own | change))
        with pytest.raises(ValueError, match=message):
            Protocol.load(str(tmp_path / "mine.json"))
    (tmp_path / "mine.json").write_text(json.dumps(own | {"filter": "box"}))
    with pytest.raises(ValueError, match="filter"):
        Protocol.load(str(tmp_path / "mine.json"))
    with pytest.raises(ValueError, match="No protocol 'adm'"):
        Protocol.load("adm")


# Sanity on photographs -----------------------------------------------------------------------------------------------


class MeanColors(torch.nn.Module):
    """Features for a Frechet distance without weights: local means and contrasts."""

    def forward(self, images):
        cells = images.float().unfold(2, 16, 16).unfold(3, 16, 16).flatten(4)
        return torch.cat([cells.mean(-1), cells.diff(dim=-1).abs().mean(-1)], 1).flatten(1)[:, ::7]


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


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs eval/reconstruction.py in `tmp_path`; gives what it prints or, with `fails`, the text of its error."""

    def run_it(*arguments, fails: bool = False) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["reconstruction.py", *map(str, arguments)])
        if not fails:
            reconstruction.main()
            return capsys.readouterr().out
        with pytest.raises((SystemExit, ValueError, RuntimeError)) as error:
            reconstruction.main()
        return f"{capsys.readouterr().err} {error.value}"

    return run_it


@pytest.fixture
def saved_model(tmp_path):
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config()).eval()
    model.save_pretrained(tmp_path / "model")
    VQRAEImageProcessor.for_image_size(32).save_pretrained(tmp_path / "model")
    return model


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
    assert "1 images" in error and "'a-0'" in error
    Image.new("RGB", (48, 40)).save(fakes / "a-0.jpg")
    error = command(
        "--real", image_folder, "--fake", fakes, "--output_dir", "out", "--network_metrics", "--image_size", 32,
        fails=True,
    )  # fmt: skip
    assert "is (40, 30) px, its original (48, 40)" in error


def test_any_function_is_measured_and_a_wrong_size_is_named(command, tmp_path, image_folder, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "theirs.py").write_text(
        "def darker(pixels):\n    return pixels * 0.5\n\n\ndef smaller(pixels):\n    return pixels[..., :16]\n"
    )
    options = ["--data", image_folder, "--output_dir", "out", "--image_size", 32, "--network_metrics"]
    command("--callable", "theirs:darker", *options)
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
        error = command("--callable", f"theirs:{name}", *options, fails=True)
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


def test_reconstructions_that_are_not_finite_are_refused():
    evaluation = Evaluation(Protocol.load("default"), Networks())
    originals = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    reconstructions = torch.zeros(2, 3, 32, 32)
    reconstructions[1, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="image 7 holds NaN"):
        evaluation.update(0, [6, 7], originals, reconstructions)


def test_bf16_and_a_reference_model_are_said_in_the_result(command, tmp_path, image_folder, saved_model):
    command(
        "--model_name_or_path", "model", "--data", image_folder, "--output_dir", "out", "--network_metrics",
        "--dtype", "bfloat16", "--reference_model", "model",
    )  # fmt: skip
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["source"]["dtype"] == "bfloat16" and result["source"]["reference_sha256"]
    assert 0.99 < result["metrics"]["feature_cosine"] < 1  # bf16 beside fp32


def test_one_image_is_enough(command, tmp_path, image_folder, inception_weights):
    command(
        "--callable", "torch:clone", "--data", image_folder, "--output_dir", "out", "--image_size", 32,
        "--max_samples", 1, "--network_metrics", "rfid", "--inception_weights", inception_weights,
    )  # fmt: skip
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["num_images"] == 1 and result["metrics"]["rfid"] == pytest.approx(0, abs=1e-3)


# Interruptions, processes --------------------------------------------------------------------------------------------


def test_an_interrupted_pass_goes_on_and_ends_with_the_same_numbers(tmp_path, image_folder):
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config()).eval()
    protocol, files = Protocol.load("default"), find_images(image_folder)
    images = CroppedImages(dataset_of_files(files), protocol, 32)
    seen = []

    def results(stop_after=None, key="same"):
        reconstruct, calls = ModelReconstruction(model, True), []

        def counted(pixels):
            if stop_after is not None and len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(len(pixels))
            return reconstruct(pixels)

        evaluation = Evaluation(protocol, Networks({"fd_colors": MeanColors()}), 64)
        try:
            evaluate(evaluation, images, counted, 5, 0, torch.device("cpu"), tmp_path / "p.pt", key, save_seconds=-1)
        finally:
            seen.append(calls)
        (tmp_path / "p.pt").unlink()
        return evaluation.compute()[0], evaluation.fingerprint()

    whole = results()
    with pytest.raises(KeyboardInterrupt):
        results(stop_after=2)
    assert results() == whole
    with pytest.raises(KeyboardInterrupt):
        results(stop_after=1)
    assert results(key="other weights") == whole
    assert seen == [[5, 5, 2], [5, 5], [2], [5], [5, 5, 2]]
    assert os.listdir(tmp_path) == ["images"]


def test_an_interrupted_command_goes_on_unless_something_else_is_asked(command, tmp_path, image_folder, monkeypatch):
    """The model, the images and the options are those of the progress, or it is not used."""
    monkeypatch.syspath_prepend(tmp_path)
    code = "calls = []\n\n\ndef half(pixels):\n    calls.append(len(pixels))\n    return pixels * {}\n"
    (tmp_path / "halving.py").write_text(code.format(0.5))
    import halving

    options = ["--callable", "halving:half", "--data", image_folder, "--image_size", 32, "--network_metrics"]
    options += ["--batch_size", 5, "--output_dir", "out"]
    expected = command(*options)
    whole = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]

    def interrupted() -> list[int]:
        halving.calls.clear()
        with monkeypatch.context() as patch:  # after the pass, before anything is written
            patch.setattr(reconstruction, "write_results", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                command(*options)
        return list(halving.calls)

    assert interrupted() == [5, 5, 2]
    halving.calls.clear()
    assert "Going on after 12 images" in command(*options) and halving.calls == [4, 4, 4]  # for the pictures
    assert json.loads((tmp_path / "out" / "results.json").read_text())["metrics"] == whole
    assert "PSNR" in expected and not list((tmp_path / "out").glob("progress*"))
    for change in ("source", "image", "option"):
        assert interrupted() == [5, 5, 2]
        halving.calls.clear()
        extra = []
        if change == "source":
            (tmp_path / "halving.py").write_text(code.format(0.4))
        elif change == "image":
            Image.new("RGB", (48, 41)).save(image_folder / "a-0.png")
        else:
            extra = ["--max_samples", 10]
        assert "starting anew" in command(*options, *extra)
        assert halving.calls[:2] == [5, 5]


def test_two_processes_measure_what_one_does(command, tmp_path, image_folder, inception_weights, saved_model):
    (image_folder / "broken.png").write_bytes(b"no image")
    arguments = [
        "--model_name_or_path", "model", "--data", image_folder, "--batch_size", 2, "--device", "cpu",
        "--network_metrics", "rfid", "--inception_weights", inception_weights,
    ]  # fmt: skip
    command(*arguments, "--output_dir", "one")
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from eval import reconstruction
reconstruction.main()
os._exit(0)  # gloo's threads may abort a process that ends before they do
""")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program]
    done = subprocess.run(
        [sys.executable, *map(str, [*launch, *arguments, "--output_dir", "two"])],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert two["num_processes"] == 2 and two["num_images"] == one["num_images"] == 12
    assert two["data"]["pixels_sha256"] == one["data"]["pixels_sha256"]
    assert len(two["skipped_images"]) == 1
    assert one["metrics"].keys() == two["metrics"].keys()
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == (value if value is None else pytest.approx(value, rel=1e-6)), name
    assert not list((tmp_path / "two").glob("progress*"))


def test_memory_does_not_hold_the_images(image_folder):
    evaluation = Evaluation(Protocol.load("default"), Networks({"fd_colors": MeanColors()}), 64)
    x = torch.zeros(4, 3, 176, 176, dtype=torch.uint8)
    for number in range(3):
        evaluation.update(number, list(range(4 * number, 4 * number + 4)), x, x / 255 + 0.1, torch.zeros(4, 9).long())
    tensors = [evaluation.counts, *(t for m in evaluation.moments.values() for t in (m.count, m.sum, m.products))]
    width = MeanColors()(x).shape[1]
    assert sum(t.numel() for t in tensors) == 64 + 2 * (1 + width + width**2)
    assert all(len(values) == 12 for values in evaluation.scores.values())


# Reports -------------------------------------------------------------------------------------------------------------


def test_pictures_are_chosen_by_rank_and_none_twice():
    scores = [float(x) for x in np.random.default_rng(0).permutation(100)]
    chosen = choose(scores, best_first=True)
    assert [scores[i] for i in chosen["best"]] == [99, 98, 97, 96, 95, 94, 93, 92]
    assert [scores[i] for i in chosen["worst"]] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert [scores[i] for i in chosen["median"]] == [53, 52, 51, 50, 49, 48, 47, 46]
    assert [scores[i] for i in choose(scores, best_first=False)["best"]] == [0, 1, 2, 3, 4, 5, 6, 7]
    for count in range(1, 12):
        places = [i for group in choose(scores[:count], True).values() for i in group]
        assert len(places) == len(set(places))


def test_pictures_show_originals_above_reconstructions(tmp_path):
    save_rows([torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8) / 2], tmp_path / "a" / "p.png", columns=2)
    picture = np.asarray(Image.open(tmp_path / "a" / "p.png"))
    assert [picture[2 + 10 * row + 4, 6, 0] for row in range(4)] == [0, 128, 0, 128]
    assert picture[36, 16, 0] == 255
    assert os.listdir(tmp_path / "a") == ["p.png"]


def test_results_are_compared_only_under_one_protocol(command, tmp_path, image_folder, monkeypatch, capsys):
    options = ["--callable", "torch:clone", "--data", image_folder, "--network_metrics"]
    for name, extra in (
        ("a", ["--image_size", 32]),
        ("b", ["--image_size", 32, "--batch_size", 3]),
        ("c", ["--protocol", "rae-256"]),
    ):
        command(*options, *extra, "--output_dir", name)
    files = {name: str(tmp_path / name / "results.json") for name in "abc"}

    def compared(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
        compare.main()

    compared(files["a"], files["b"])
    assert "| SSIM | 1 | 1 (+0) |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="Not compared"):
        compared(files["a"], files["c"])
    error = capsys.readouterr().err
    assert "default and rae-256 differ in image_size (None / 256)" in error and "images of 32 and 256 px" in error
    compared(str(tmp_path / "a"), files["c"], "--allow_differences")  # a folder does as well
    output = capsys.readouterr().out
    assert "| SSIM |" in output and "- not comparable: " in output


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
