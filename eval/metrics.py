"""What is measured on tokens and pixels beside the metrics that are modules of their own."""

import torch


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
