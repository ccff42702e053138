"""How much of a codebook is in use."""

import datasets
import evaluate
import torch


_DESCRIPTION = """
Utilization, perplexity and entropy of the discrete codes that a tokenizer gives. Utilization is the share of the codes
that occur at all; perplexity is the exponential of the entropy of their frequencies, the number of equally frequent
codes that would be as uncertain. Neither means much when there are few tokens per code, so their number is given too.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: the codes, flat: one integer in [0, codebook_size) each.
    codebook_size: number of codes there are.
Returns:
    codebook_utilization: in [0, 1].
    codebook_perplexity: in [1, codebook_size].
    codebook_entropy: in bits.
    codebook_tokens: number of codes given.
Examples:

    >>> usage = evaluate.load("eval/codebook_usage")
    >>> usage.compute(predictions=[0, 0, 1, 2], codebook_size=4)
    {'codebook_utilization': 0.75, 'codebook_perplexity': 2.83, 'codebook_entropy': 1.5, 'codebook_tokens': 4}
"""

_CITATION = ""


def codebook_statistics(counts: torch.Tensor) -> dict[str, float]:
    """Utilization, perplexity, entropy (bits) and number of tokens of (codebook_size,) counts."""
    total = counts.sum()
    frequencies = counts[counts > 0].double() / total
    entropy = -(frequencies * frequencies.log2()).sum()
    return {
        "codebook_utilization": (counts > 0).double().mean().item(),
        "codebook_perplexity": (2**entropy).item(),
        "codebook_entropy": entropy.item(),
        "codebook_tokens": total.item(),
    }


def count_codes(codes: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """(codebook_size,) int64 counts of integers of any shape.

    Raises:
        ValueError: some are outside [0, codebook_size).
    """
    codes = codes.flatten()
    if len(codes) and not (0 <= codes.min() and codes.max() < codebook_size):
        raise ValueError(f"Codes must be in [0, {codebook_size}), got {codes.min().item()} to {codes.max().item()}.")
    return torch.bincount(codes, minlength=codebook_size)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CodebookUsage(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("int64")}),
        )

    def _compute(self, predictions, codebook_size):
        return codebook_statistics(count_codes(torch.tensor(predictions), codebook_size))
