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
    """(B, C, H, W) in [0, 1], twice -> (B,). For `window` see the metric.

    Raises:
        ValueError: an unknown window.
    """
    if window == "gaussian":
        return structural_similarity_index_measure(reconstructions, originals, data_range=1.0, reduction="none")
    if window != "uniform":
        raise ValueError(f"window must be 'gaussian' or 'uniform', got '{window}'.")
    x, y = reconstructions.double(), originals.double()  # variances are differences of large numbers
    size = 7
    means = [torch.nn.functional.avg_pool2d(maps, size, stride=1) for maps in (x, y, x * x, y * y, x * y)]
    unbiased = size**2 / (size**2 - 1)
    variance_x, variance_y, covariance = (
        unbiased * (product - a * b)
        for product, a, b in zip(means[2:], (means[0], means[1], means[0]), (means[0], means[1], means[1]))
    )
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * means[0] * means[1] + c1) * (2 * covariance + c2)
    similarity = similarity / ((means[0] ** 2 + means[1] ** 2 + c1) * (variance_x + variance_y + c2))
    return similarity.flatten(1).mean(1)


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
