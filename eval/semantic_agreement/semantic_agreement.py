"""Semantic agreement: whether an encoder sees the same in a reconstruction as in its original."""

import datasets
import evaluate
import torch
import torch.nn.functional as F


_DESCRIPTION = """
Cosine similarity between the features that a vision encoder has of an original and of its reconstruction, token by
token, averaged over tokens and then over images. 1 for equal features.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: features of reconstructions, for each image a list of tokens, each a list of numbers.
    references: features of their originals, likewise.
Returns:
    semantic_agreement: the mean over images, in [-1, 1].
    scores: one value for each image.
Examples:

    >>> agreement = evaluate.load("eval/semantic_agreement")
    >>> agreement.compute(predictions=[[[1.0, 0.0]]], references=[[[1.0, 0.0]]])
    {'semantic_agreement': 1.0, 'scores': [1.0]}
"""

_CITATION = ""


def cosine_per_image(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of (B, N, D) features, averaged over the N tokens: (B,)."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1).mean(1)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SemanticAgreement(evaluate.Metric):
    def _info(self):
        tokens = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": tokens, "references": tokens}),
        )

    def _compute(self, predictions, references):
        pairs = zip(predictions, references)
        scores = [cosine_per_image(torch.tensor(a)[None], torch.tensor(b)[None]).item() for a, b in pairs]
        return {"semantic_agreement": sum(scores) / len(scores), "scores": scores}
