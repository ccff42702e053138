"""PSNR: the peak signal-to-noise ratio of reconstructions."""

import datasets
import evaluate
import numpy as np
import torch


_DESCRIPTION = """
Peak signal-to-noise ratio in dB, `10 log10(255^2 / mean squared error)`, of each image, then the mean over images (not
of the error pooled over all of them). Higher is better; infinite for equal images.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: reconstructions, RGB images of 8 bits.
    references: their originals, each of the same size as its reconstruction.
Returns:
    psnr: the mean over images, in dB.
    scores: one value for each image.
Examples:

    >>> psnr = evaluate.load("eval/psnr")
    >>> psnr.compute(predictions=[reconstruction], references=[original])
    {'psnr': 22.23, 'scores': [22.23]}
"""

_CITATION = ""


def psnr_per_image(reconstructions: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) in [0, 1], twice -> (B,) in dB, float64; infinite where they are equal."""
    error = (reconstructions.double() - originals.double()).square().flatten(1).mean(1)
    return -10 * error.log10()


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PSNR(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(self, predictions, references):
        scores = []
        for pair in zip(predictions, references):
            fake, real = (torch.from_numpy(np.array(image.convert("RGB")))[None] / 255 for image in pair)
            if fake.shape != real.shape:
                raise ValueError(f"Image {len(scores)}: a {pair[0].size} prediction of a {pair[1].size} reference.")
            scores.append(psnr_per_image(fake, real).item())
        return {"psnr": float(np.mean(scores)), "scores": scores}
