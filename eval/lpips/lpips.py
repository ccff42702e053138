"""LPIPS: how different two images look, by the features of a network."""

import datasets
import evaluate
import numpy as np
import torch
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity


_DESCRIPTION = """
Learned Perceptual Image Patch Similarity (Zhang et al. 2018): the weighted distance between the features that AlexNet
or VGG has of two images. Lower is better, 0 for equal images.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: reconstructions, RGB images of 8 bits, at least 32 px a side.
    references: their originals, each of the same size as its reconstruction.
    net_type: "alex" (the default) or "vgg". torchvision's weights of it come from the cache of torch.hub or are
        downloaded (233 and 528 MB).
Returns:
    lpips: the mean over images.
    scores: one value for each image.
Examples:

    >>> lpips = evaluate.load("eval/lpips")
    >>> lpips.compute(predictions=[reconstruction], references=[original], net_type="vgg")
    {'lpips': 0.21, 'scores': [0.21]}
"""

_CITATION = """
@inproceedings{zhang2018perceptual,
  title={The Unreasonable Effectiveness of Deep Features as a Perceptual Metric},
  author={Zhang, Richard and Isola, Phillip and Efros, Alexei A and Shechtman, Eli and Wang, Oliver},
  booktitle={CVPR},
  year={2018}
}
"""


_FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}  # of torchvision


def load_lpips(net_type: str) -> torch.nn.Module:
    """The network alone: called on two (B, 3, H, W) batches in [-1, 1] (or in [0, 1] with `normalize=True`), it gives
    (B, 1, 1, 1) distances.

    Raises:
        OSError, RuntimeError: its weights cannot be had.
    """
    try:
        return LearnedPerceptualImagePatchSimilarity(net_type=net_type).net.requires_grad_(False).eval()
    except OSError as error:  # URLError is one
        raise OSError(
            f"torchvision's weights for LPIPS ({net_type}) cannot be downloaded ({error}): put "
            f"https://download.pytorch.org/models/{_FILES[net_type]} into {torch.hub.get_dir()}/checkpoints."
        ) from error


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class LPIPS(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
            reference_urls=["https://arxiv.org/abs/1801.03924", "https://github.com/richzhang/PerceptualSimilarity"],
        )

    @torch.no_grad()
    def _compute(self, predictions, references, net_type="alex"):
        network, scores = load_lpips(net_type), []
        for pair in zip(predictions, references):
            fake, real = (torch.from_numpy(np.array(x.convert("RGB"))).permute(2, 0, 1)[None] / 255 for x in pair)
            if fake.shape != real.shape:
                raise ValueError(f"Image {len(scores)}: a {pair[0].size} prediction of a {pair[1].size} reference.")
            scores.append(network(fake, real, normalize=True).item())
        return {"lpips": float(np.mean(scores)), "scores": scores}
