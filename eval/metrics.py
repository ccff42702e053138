"""Metrics of a reconstruction and of the tokens in between."""

import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure


class CodebookUsage(Metric):
    """Utilization and perplexity of a codebook, from counts summed over all batches and all processes.

    utilization = share of the codes used at least once, in [0, 1]; perplexity = exp of the entropy of the codes'
    frequencies, in [1, codebook_size]. Neither means much with few tokens per code, so their number is given as well.

    Args:
        codebook_size: number of codes.
        **kwargs: those of `torchmetrics.Metric`.
    """

    full_state_update = False

    def __init__(self, codebook_size: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(codebook_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, image_tokens: torch.Tensor) -> None:
        """image_tokens: integers of any shape, each in [0, codebook_size)."""
        self.counts += torch.bincount(image_tokens.flatten(), minlength=len(self.counts))

    def compute(self) -> dict[str, float]:
        return codebook_statistics(self.counts)


def codebook_statistics(counts: torch.Tensor) -> dict[str, float]:
    """Utilization, perplexity and number of tokens of (codebook_size,) counts."""
    total = counts.sum()
    frequencies = counts[counts > 0].double() / total
    entropy = -(frequencies * frequencies.log()).sum()
    return {
        "codebook_utilization": (counts > 0).double().mean().item(),
        "codebook_perplexity": entropy.exp().item(),
        "codebook_tokens": total.item(),
    }


class CodebookWindow:
    """Counts of the latest tokens of each code: at least the last 64 per code, once there have been as many, and fewer
    than twice that; in the memory of two counts.

    Args:
        codebook_size: number of codes.
    """

    tokens_per_code = 64

    def __init__(self, codebook_size: int) -> None:
        self._previous = torch.zeros(codebook_size, dtype=torch.int64)
        self._current = self._previous.clone()

    def add(self, counts: torch.Tensor) -> torch.Tensor:
        """Adds (codebook_size,) new counts and returns those of the window."""
        if self._current.sum() >= self.tokens_per_code * len(self._current):
            self._previous, self._current = self._current, torch.zeros_like(self._current)
        self._current += counts.cpu()
        return self._previous + self._current


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels, nominally in [0, 1], clamped and rounded to what an image file holds."""
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)


def pixel_metrics(**kwargs) -> MetricCollection:
    """PSNR (dB, averaged over images, not pooled over their pixels) and SSIM (11 px Gaussian window, borders
    included), for pixels in [0, 1] that have been through `to_uint8`. Keyword arguments: `torchmetrics.Metric`'s."""
    return MetricCollection(
        {
            "psnr": PeakSignalNoiseRatio(data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3), **kwargs),
            "ssim": StructuralSimilarityIndexMeasure(data_range=1.0, **kwargs),
        }
    )
