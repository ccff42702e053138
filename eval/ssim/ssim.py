"""SSIM and MS-SSIM of reconstructions."""

import datasets
import evaluate
import numpy as np
import torch
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)


_DESCRIPTION = """
Structural similarity (Wang et al. 2004) of reconstructions and their originals, and its multiscale form (2003): means,
variances and covariance in windows, averaged over pixels, colours and images. 1 for equal images.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: reconstructions, RGB images of 8 bits.
    references: their originals, each of the same size as its reconstruction.
    window: "gaussian" (11 px, sigma 1.5, borders reflected and counted; the default) or "uniform" (7 px, borders left
        out, sample covariance: the defaults of scikit-image).
    multiscale: MS-SSIM at five scales, for images of at least 176 px a side.
Returns:
    ssim (or ms_ssim): the mean over images.
    scores: one value for each image.
Examples:

    >>> ssim = evaluate.load("eval/ssim")
    >>> ssim.compute(predictions=[reconstruction], references=[original])
    {'ssim': 0.762, 'scores': [0.762]}
"""

_CITATION = """
@article{wang2004image,
  title={Image Quality Assessment: From Error Visibility to Structural Similarity},
  author={Wang, Zhou and Bovik, Alan C and Sheikh, Hamid R and Simoncelli, Eero P},
  journal={IEEE Transactions on Image Processing},
  year={2004}
}
"""


def ssim_per_image(reconstructions: torch.Tensor, originals: torch.Tensor, window: str = "gaussian") -> torch.Tensor:
    """(B, C, H, W) in [0, 1], of 8 bits, twice -> (B,). For `window` see the metric.

    Raises:
        ValueError: an unknown window.
    """
    if window == "gaussian":
        return structural_similarity_index_measure(reconstructions, originals, data_range=1.0, reduction="none")
    if window != "uniform":
        raise ValueError(f"window must be 'gaussian' or 'uniform', got '{window}'.")
    parts = zip(reconstructions.split(8), originals.split(8))  # that stay in a cache
    return torch.cat([_uniform_ssim(*((x * 255).round() for x in part)) for part in parts])


def _uniform_ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SSIM of levels 0 to 255 with a 7 px uniform window. Sums over a window are whole numbers below 2^24, exact in
    float32, and what variances are made of is below 2^31: there is no rounding before the last fraction."""
    size = 7
    area = size**2

    def window_sums(maps: torch.Tensor) -> torch.Tensor:
        for _ in range(2):  # rows, then columns
            band = torch.ones(maps.shape[-1], maps.shape[-1], device=maps.device).tril().triu(1 - size)[size - 1 :]
            maps = (maps @ band.T).transpose(-1, -2)
        return maps.int()

    sx, sy, sxx, syy, sxy = (window_sums(maps) for maps in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255 * area) ** 2, (0.03 * 255) ** 2 * area * (area - 1)  # sample covariance
    means, squares = 2 * (sx * sy).float() + c1, (sx * sx + sy * sy).float() + c1
    contrast = (2 * (area * sxy - sx * sy)).float() + c2
    variances = (area * (sxx + syy) - sx * sx - sy * sy).float() + c2
    return (means / squares * (contrast / variances)).flatten(1).mean(1)


def ms_ssim_per_image(reconstructions: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) in [0, 1] of at least 176 px a side, twice -> (B,)."""
    return multiscale_structural_similarity_index_measure(reconstructions, originals, data_range=1.0, reduction="none")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SSIM(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(self, predictions, references, window="gaussian", multiscale=False):
        scores = []
        for pair in zip(predictions, references):
            fake, real = (torch.from_numpy(np.array(x.convert("RGB"))).permute(2, 0, 1)[None] / 255 for x in pair)
            if fake.shape != real.shape:
                raise ValueError(f"Image {len(scores)}: a {pair[0].size} prediction of a {pair[1].size} reference.")
            score = ms_ssim_per_image(fake, real) if multiscale else ssim_per_image(fake, real, window)
            scores.append(score.item())
        return {"ms_ssim" if multiscale else "ssim": float(np.mean(scores)), "scores": scores}
