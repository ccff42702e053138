"""Protocols against the formulas of the references."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from test_loading import ROOT

from eval.crops import CroppedImages
from eval.evaluation import Evaluation, Networks
from eval.protocol import Protocol, names
from reading.files import dataset_of_files


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
