"""Protocols: everything between image files and numbers that changes the numbers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, center_crop, resize

from eval.files import read_fields
from eval.metrics import to_uint8
from image_processing_simvq import to_rgb
from reading.wording import did_you_mean


FOLDER = Path(__file__).parent / "protocols"
GENERATION_FOLDER = FOLDER / "generation"
_CHOICES = {
    "resize": ("bicubic", "bilinear", "adm"),
    "transparency": ("white", "dropped"),
    "rounding": ("nearest", "down", "down from [-1, 1]"),
    "inception": ("torch-fidelity", "pytorch-fid", None),
    "inception_dtype": ("float32", "float64"),
    "lpips_input": ("8 bits", "float"),
    "psnr": ("per image", "pooled over batches", None),
    "ssim": ("gaussian", "uniform", None),
}


@dataclass(frozen=True)
class Protocol:
    """How images become numbers; one JSON file of `eval/protocols` each.

    Args:
        name: of the protocol.
        source: repository and file it was read from.
        reference_set: what the originals are in the numbers that were published with it.
        remarks: what to know of it, such as faults that are reproduced.
        image_size: side of the square crop in pixels; `None`: that of the model.
        resize: of the shorter side, by Pillow, before the centre crop. "bicubic" and "bilinear" are antialiased; "adm"
            halves with a box filter as long as it can, then is bicubic, and rounds otherwise (guided-diffusion).
        transparency: "white": composited on white; "dropped": the alpha channel is left out.
        turned_by_exif: whether files are turned as their EXIF says.
        rounding: to 8 bits. "nearest"; "down" (truncated) for reconstructions; or "down from [-1, 1]", where originals
            make the same way and lose a level here and there.
        inception: preprocessing of rFID, see `InceptionV3`; `None`: no rFID.
        inception_dtype: of that network.
        lpips_networks: "alex", "vgg", or both.
        lpips_input: images of 8 bits, or what the model gave, clamped.
        psnr: "per image": their mean. "pooled over batches": of the error of a whole batch, averaged over batches; SSIM
            is then averaged over batches, too.
        psnr_limit: in dB; equal images count as that many. `None`: their PSNR is infinite.
        ssim: window, see `ssim_per_image`.
        ms_ssim: MS-SSIM too, from 176 px a side.
        semantic_agreement: cosine similarity of the encoder's features of original and reconstruction.
        blocking: how much the grid of a tokenizer's patches shows, see `eval/blocking`.
        flat_colours: what a tokenizer makes of images of one colour, see `measure_flat_colours`.
        batch_size: images in a batch, where that changes the numbers; `None`: it does not.
    """

    name: str
    source: str
    reference_set: str
    remarks: list[str]
    image_size: int | None
    resize: str
    transparency: str
    turned_by_exif: bool
    rounding: str
    inception: str | None
    inception_dtype: str
    lpips_networks: list[str]
    lpips_input: str
    psnr: str | None
    psnr_limit: float | None
    ssim: str | None
    ms_ssim: bool
    semantic_agreement: bool
    blocking: bool
    flat_colours: bool
    batch_size: int | None

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"Protocol {self.name}: {name} is '{getattr(self, name)}', not one of {choices}.")
        if self.psnr == "pooled over batches" and not self.batch_size:
            raise ValueError(f"Protocol {self.name}: a PSNR pooled over batches needs batch_size.")

    @classmethod
    def load(cls, name_or_path: str) -> "Protocol":
        """A named protocol, or one's own JSON file.

        Raises:
            ValueError: neither; or fields that are missing or unknown.
        """
        return _load(cls, name_or_path, FOLDER)

    def crop(self, image: Image.Image, size: int | None) -> np.ndarray:
        """A PIL image of any mode as (size, size, 3), uint8; of its own size where `size` is `None`."""
        image = to_rgb(image, self.transparency, self.turned_by_exif)
        if size is not None:
            if self.resize == "adm":
                image = _resized_by_adm(image, size)
                left, top = (image.width - size) // 2, (image.height - size) // 2
                image = image.crop((left, top, left + size, top + size))
            else:
                image = center_crop(resize(image, size, InterpolationMode[self.resize.upper()]), size)
        return np.asarray(image)

    def eight_bits(self, originals: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Originals, uint8, and reconstructions, nominally in [0, 1], as the metrics on 8 bits see them: both uint8."""
        if self.rounding == "nearest":
            return originals, to_uint8(pixels)
        if self.rounding == "down":
            return originals, (pixels.clamp(0, 1) * 255).to(torch.uint8)
        pair = (originals.double() / 127.5 - 1).float(), (pixels * 2 - 1).clamp(-1, 1)
        return tuple(((x + 1) / 2 * 255).to(torch.uint8) for x in pair)


@dataclass(frozen=True)
class GenerationProtocol:
    """How generated images are judged; one JSON file of `eval/protocols/generation` each.

    Args:
        name: of the protocol.
        source: what it was read from.
        remarks: what to know of it.
        images: the protocol of reconstruction by which samples and real images are cropped alike, and that says what
            Inception sees.
        num_samples: how many there must be; `None`: any number.
        balanced_classes: as many samples of each class, to within one.
        seeds: "one each": no two samples have the same; `None`: it does not matter.
        guidance_scale: by which they are drawn; "any": it must be known; `None`: it does not matter.
        inception_neighbours: k of precision, recall, density and coverage on Inception's features.
        neighbours: the same on other features.
        inception_score_splits: parts of the samples, over whose scores the Inception score is the mean.
    """

    name: str
    source: str
    remarks: list[str]
    images: str
    num_samples: int | None
    balanced_classes: bool
    seeds: str | None
    guidance_scale: float | str | None
    inception_neighbours: int
    neighbours: int
    inception_score_splits: int

    def __post_init__(self):
        for name in ("inception_neighbours", "neighbours", "inception_score_splits"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"Protocol {self.name}: {name} is {getattr(self, name)!r}, not a number from 1 on.")
        if self.seeds not in ("one each", None):
            raise ValueError(f"Protocol {self.name}: seeds is '{self.seeds}', neither 'one each' nor null.")

    @classmethod
    def load(cls, name_or_path: str) -> "GenerationProtocol":
        """As `Protocol.load`."""
        return _load(cls, name_or_path, GENERATION_FOLDER)


def _load(kind: type, name_or_path: str, folder: Path):
    path = Path(name_or_path) if name_or_path.endswith(".json") else folder / f"{name_or_path}.json"
    if not path.is_file():
        meant = did_you_mean(name_or_path, names(folder))
        there = f": pass one of {', '.join(names(folder))}, or a .json file."
        raise ValueError(f"No protocol '{name_or_path}'{meant or there}")
    try:
        return kind(**read_fields(path))
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None


def names(folder: Path = FOLDER) -> list[str]:
    """Of the protocols there are."""
    return sorted(file.stem for file in folder.glob("*.json"))


def _resized_by_adm(image: Image.Image, size: int) -> Image.Image:
    """The resize of guided-diffusion (image_datasets.py, center_crop_arr), which RAE uses."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
