"""Blocking: how much of the grid of patches shows in reconstructions."""

import datasets
import evaluate
import numpy as np
import torch


_DESCRIPTION = """
How much a tokenizer's grid of patches shows. The mean absolute step between neighbouring pixels across the borders of
patches, over that within patches, is taken down the columns and along the rows, and the two are averaged; blocking is
this number of the reconstructions divided by that of their originals. 1: no grid; 3: borders stand out three times as
much as in the originals.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: reconstructions, RGB images of 8 bits.
    references: their originals, each of the same size as its reconstruction.
    patch_size: side of a patch in pixels; the first patch begins at the upper left corner.
Returns:
    blocking: of all images together (steps are summed up before anything is divided, so that an image without steps is
        no division by zero). Infinite where the reconstructions have steps at borders alone, and NaN where nothing can
        be said: no image is larger than a patch in both directions, or the originals have no steps.
Examples:

    >>> blocking = evaluate.load("eval/blocking")
    >>> blocking.compute(predictions=[reconstruction], references=[original], patch_size=8)
    {'blocking': 3.5}
"""

_CITATION = ""


def count_steps(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, C, H, W), uint8 -> steps between neighbouring pixels, (2, 2, 2) of int64: down and along; across borders of
    patches and within; the sum of their absolute values and their number. Those of more images are added."""
    steps = images.new_zeros((2, 2, 2), dtype=torch.int64)
    for direction in (0, 1):
        size = images.short().diff(dim=direction + 2).abs()
        at_border = torch.arange(1, size.shape[direction + 2] + 1, device=images.device) % patch_size == 0
        for kind, chosen in enumerate((at_border, ~at_border)):
            some = size.index_select(direction + 2, chosen.nonzero().flatten())
            steps[direction, kind, 0], steps[direction, kind, 1] = some.sum(), some.numel()
    return steps


def blocking_of(reconstructions: torch.Tensor, originals: torch.Tensor) -> float:
    """Blocking of what `count_steps` gave; see above."""
    means = (steps[..., 0].double() / steps[..., 1] for steps in (reconstructions, originals))
    fake, real = ((mean[:, 0] / mean[:, 1]).mean() for mean in means)
    return (fake / real).item()


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Blocking(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(self, predictions, references, patch_size):
        totals = torch.zeros(2, 2, 2, 2, dtype=torch.int64)
        for number, pair in enumerate(zip(predictions, references)):
            images = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] for image in pair]
            if images[0].shape != images[1].shape:
                raise ValueError(f"Image {number}: a {pair[0].size} prediction of a {pair[1].size} reference.")
            totals += torch.stack([count_steps(image, patch_size) for image in images])
        return {"blocking": blocking_of(*totals)}
