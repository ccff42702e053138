"""One pass over images under a protocol: what is summed up, saved for a resumption, joined, and computed."""

import hashlib
import math
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import nn

from eval.blocking.blocking import blocking_of, count_steps
from eval.codebook_usage.codebook_usage import codebook_statistics, count_codes
from eval.crops import different_sizes
from eval.protocol import Protocol
from eval.psnr.psnr import psnr_per_image
from eval.rfid.rfid import Moments, frechet_distance
from eval.ssim.ssim import ms_ssim_per_image, ssim_per_image
from reading.wording import counted


STABLE_FRECHET = 10_000  # images; the bias of a Frechet distance falls with their number


@dataclass
class Networks:
    """The pretrained networks of the metrics.

    Args:
        frechet: by the name of the distance ("rfid", "fd_..."): a module from images to (B, D) features. That of "rfid"
            takes what the protocol's `inception` says, the others (B, 3, H, W) of uint8.
        lpips: by the name of the metric ("lpips_alex", "lpips_vgg"): see `load_lpips`.
        reference_statistics: by the name of the distance: mean and covariance of the originals, where they are known.
    """

    frechet: dict[str, nn.Module] = field(default_factory=dict)
    lpips: dict[str, nn.Module] = field(default_factory=dict)
    reference_statistics: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def few_images(name: str, images: str, count: int, width: int) -> list[str]:
    """The warning that a Frechet distance is of too few images, if it is.

    Args:
        name: of the distance.
        images: what it is of, in words.
        count: of the images on the smaller side.
        width: number of features.
    """
    if count >= STABLE_FRECHET:
        return []
    rank = f", fewer than its {width} features, so that covariances have no full rank" * (count <= width)
    return [
        f"{name} is of {images}{rank}: it is biased upwards and noisy. Compare it with values of as many images only, "
        f"and publish it on {STABLE_FRECHET:,} or more (50,000 is usual)."
    ]


class Evaluation:
    """Metrics of reconstructions under a protocol.

    Memory grows with the number of images by a few numbers each, whatever their size.

    Args:
        protocol: see [`Protocol`].
        networks: see [`Networks`].
        codebook_size: number of codes; `None` where there are no tokens.
        patch_size: side in pixels of what a token stands for; `None` where there are no patches.
    """

    def __init__(
        self,
        protocol: Protocol,
        networks: Networks,
        codebook_size: int | None = None,
        patch_size: int | None = None,
    ) -> None:
        self.protocol = protocol
        self.networks = networks
        self.patch_size = patch_size if protocol.blocking else None
        self.scores: dict[str, list] = {}  # by metric, one value for each image
        self.index: list[int] = []  # of each image in the data
        self.batch: list[int] = []  # and of its batch
        self.digests: list[str] = []  # of the originals' pixels
        self.skipped: list[tuple[int, str]] = []  # index and message
        self.not_finite: list[int] = []  # index of those among them whose numbers are not
        self.counts = None if codebook_size is None else torch.zeros(codebook_size, dtype=torch.int64)
        self.steps = torch.zeros(2, 2, 2, 2, dtype=torch.int64)  # of reconstructions and originals, see `count_steps`
        self.moments: dict[str, Moments] = {}  # by the name of the distance and "real" or "fake"
        self.size: list[int] | None = None  # height and width of the images
        self.seconds = 0.0  # that earlier sessions took
        self.outside = 0.0  # share of an image's pixels that are far from [0, 1], summed over images

    @torch.no_grad()
    def update(
        self,
        batch: int,
        index: list[int],
        originals: torch.Tensor,
        reconstructions: torch.Tensor,
        tokens: torch.Tensor | None = None,
        **scores: torch.Tensor,
    ) -> list[int]:
        """Adds a batch; images whose reconstruction or scores hold NaN or infinity are left out.

        Args:
            batch: its number.
            index: the number of each image in the data.
            originals: (B, 3, H, W), uint8.
            reconstructions: (B, 3, H, W), floating point, nominally in [0, 1].
            tokens: integers, (B, ...).
            **scores: further values by name, (B,) each.

        Returns:
            the numbers of the images that are left out.

        Raises:
            ValueError: reconstructions of another size.
        """
        if reconstructions.shape != originals.shape:
            raise ValueError(
                f"Reconstructions are {tuple(reconstructions.shape)}, originals {tuple(originals.shape)}: the "
                "tokenizer must give images of the size that it gets."
            )
        self.size = self.size or list(originals.shape[2:])
        if list(originals.shape[2:]) != self.size:
            raise ValueError(different_sizes(self.size, originals.shape[2:]))
        protocol = self.protocol
        reconstructions = reconstructions.float()
        finite = reconstructions.isfinite().flatten(1).all(1)
        for values in scores.values():
            finite &= values.isfinite()
        left_out = [i for i, measured in zip(index, finite.tolist()) if not measured]
        if left_out:
            self.not_finite += left_out
            index = [i for i in index if i not in left_out]
            originals, reconstructions = originals[finite], reconstructions[finite]
            tokens = None if tokens is None else tokens[finite]
            scores = {name: values[finite] for name, values in scores.items()}
            if not index:
                return left_out
        outside = ((reconstructions < -0.25) | (reconstructions > 1.25)).float().mean().item()
        self.outside += outside * len(index)
        real8, fake8 = protocol.eight_bits(originals, reconstructions)
        real, fake = real8 / 255, fake8 / 255
        scores = dict(scores)
        if protocol.psnr:
            pooled = protocol.psnr == "pooled over batches"
            scores["psnr"] = (
                psnr_per_image(fake.flatten()[None], real.flatten()[None]).expand(len(fake))
                if pooled
                else psnr_per_image(fake, real)
            )
            if protocol.psnr_limit is not None:
                scores["psnr"] = scores["psnr"].clamp_max(protocol.psnr_limit)
        if protocol.ssim:
            scores["ssim"] = ssim_per_image(fake, real, protocol.ssim)
        if self.patch_size:
            self.steps += torch.stack([count_steps(x, self.patch_size).cpu() for x in (fake8, real8)])
        if protocol.ms_ssim and min(real.shape[2:]) >= 176:
            scores["ms_ssim"] = ms_ssim_per_image(fake, real)
        exact_real, exact_fake = originals / 255, reconstructions.clamp(0, 1)
        pair = (fake, real) if protocol.lpips_input == "8 bits" else (exact_fake, exact_real)
        for name, network in self.networks.lpips.items():
            scores[name] = network(*pair, normalize=True).flatten()
        for name, network in self.networks.frechet.items():
            floats = name == "rfid" and protocol.inception == "pytorch-fid"
            images = {"fake": exact_fake if floats else fake8}
            if name not in self.networks.reference_statistics:
                images["real"] = exact_real if floats else real8
            for kind, x in images.items():
                features = network(x)
                key = f"{name}.{kind}"
                if key not in self.moments:
                    self.moments[key] = Moments(features.shape[1], features.device)
                self.moments[key].update(features)
        if tokens is not None:
            self.counts += count_codes(tokens, len(self.counts)).cpu()
        for name, values in scores.items():
            self.scores.setdefault(name, []).extend(values.double().tolist())
        self.index += index
        self.batch += [batch] * len(index)
        self.digests += [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in originals.cpu()]
        return left_out

    def state_dict(self) -> dict:
        """What a resumption needs: tensors, numbers and text."""
        names = (
            "scores",
            "index",
            "batch",
            "digests",
            "skipped",
            "not_finite",
            "counts",
            "steps",
            "size",
            "seconds",
            "outside",
        )
        state = {name: getattr(self, name) for name in names}
        state["moments"] = {key: [m.count, m.sum, m.products] for key, m in self.moments.items()}
        return state

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Takes up what `state_dict` gave, loaded to the CPU; the sums of features go to `device`."""
        state = dict(state)
        for key, (count, total, products) in state.pop("moments").items():
            self.moments[key] = moments = Moments(len(total), device)
            moments.count, moments.sum, moments.products = (x.to(device) for x in (count, total, products))
        self.__dict__.update(state)

    def join(self) -> None:
        """Joins the parts of all processes, on each of them, in the order of the images."""
        own = self.state_dict()
        widths = {key: len(total) for key, (_, total, _) in own.pop("moments").items()}
        parts = [own]
        if PartialState().num_processes > 1:
            gathered = gather_object([(own, widths)])
            parts = [part for part, _ in gathered]
            for key, width in sorted({item for _, widths in gathered for item in widths.items()}):
                # a process may have had no image
                moments = self.moments.setdefault(key, Moments(width, PartialState().device))
                for name in ("count", "sum", "products"):
                    setattr(moments, name, reduce(getattr(moments, name), reduction="sum"))
        sizes = [part["size"] for part in parts if part["size"]]
        for size in sizes:
            if size != sizes[0]:
                raise ValueError(different_sizes(sizes[0], size))
        self.seconds = max(part["seconds"] for part in parts)
        self.outside = sum(part["outside"] for part in parts)
        index = [i for part in parts for i in part["index"]]
        order = sorted(range(len(index)), key=index.__getitem__)

        def joined(columns) -> list:
            values = [value for column in columns for value in column]
            return [values[i] for i in order]

        names = {name for part in parts for name in part["scores"]}
        self.scores = {name: joined(part["scores"].get(name, []) for part in parts) for name in sorted(names)}
        for name in ("index", "batch", "digests"):
            setattr(self, name, joined(part[name] for part in parts))
        self.skipped = sorted(value for part in parts for value in part["skipped"])
        self.not_finite = sorted(value for part in parts for value in part["not_finite"])
        if self.counts is not None:
            self.counts = sum(part["counts"] for part in parts)
        self.steps = sum(part["steps"] for part in parts)

    def fingerprint(self) -> str:
        """SHA-256 of the pixels of all originals, cropped, in their order: the same for the same images under the same
        crop, wherever they come from."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def compute(self) -> tuple[dict[str, float | None], dict[str, str], list[str]]:
        """After `join`: metrics by name; for those that are `None`, the reason; and warnings.

        Raises:
            ValueError: there were no images.
        """
        if not self.index:
            raise ValueError("There were no images to evaluate, or none of them could be read or gave finite numbers.")
        metrics, reasons, warnings = {}, {}, []
        if self.outside > 0.05 * len(self.index):
            warnings.append(
                f"{self.outside / len(self.index):.0%} of the pixels of reconstructions are below -0.25 or above 1.25: "
                "they must be in [0, 1], as what they are made of is. Undo a normalisation."
            )
        for name, values in self.scores.items():
            metrics[name] = self._mean(name, values)
            if math.isinf(metrics[name]):
                equal = sum(math.isinf(value) for value in values)
                metrics[name], reasons[name] = None, f"infinite: {equal} of {len(values)} equal their original"
        for name in self.networks.frechet:
            fake = self.moments[f"{name}.fake"]
            real = self.networks.reference_statistics.get(name)
            real = self.moments[f"{name}.real"].compute() if real is None else real
            real = tuple(x.to(fake.sum.device) for x in real)
            metrics[name] = frechet_distance(*fake.compute(), *real)
            warnings += few_images(name, counted(len(self.index), "image"), len(self.index), len(fake.sum))
        if self.patch_size:
            metrics["blocking"] = blocking = blocking_of(*self.steps)
            if not math.isfinite(blocking):
                nothing = (
                    "the originals or the reconstructions have no steps within patches, or there is one patch alone"
                )
                metrics["blocking"], reasons["blocking"] = None, f"not finite: {nothing}"
        if self.counts is not None:
            metrics |= codebook_statistics(self.counts)
            if metrics["codebook_tokens"] < 8 * len(self.counts):
                warnings.append(
                    f"{counted(metrics['codebook_tokens'], 'token')} for {len(self.counts):,} codes: utilization and "
                    "perplexity are bounded by their number."
                )
        return metrics, reasons, warnings

    def _mean(self, name: str, values: list[float]) -> float:
        """Over images; or over batches, whatever their size."""
        if name not in ("psnr", "ssim") or self.protocol.psnr != "pooled over batches":
            return math.fsum(values) / len(values)
        batches = {}
        for batch, value in zip(self.batch, values):
            batches.setdefault(batch, []).append(value)
        return math.fsum(math.fsum(values) / len(values) for values in batches.values()) / len(batches)
