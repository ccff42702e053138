"""What is fitted to images before anything is trained: samples of latents, fused latents and the decoder's linear path.

All of it is linear algebra on sums over images, which are the same whatever the order of the images and the number of
processes. Sums are kept in float64.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import logging


try:
    from .quantization_simvq import float64_device
except ImportError:
    if __package__:  # a real error inside it must not be masked
        raise
    from quantization_simvq import float64_device


logger = logging.get_logger(__name__)

MOST_BYTES = 2**32  # of what a fit keeps, on all processes together
RIDGE = 1e-4  # of the mean variance of the inputs: least squares stay stable where inputs hardly vary


# Processes -----------------------------------------------------------------------------------------------------------


def processes() -> tuple[int, int]:
    """The number of this process, and of all."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """The rows (N, dim) of all processes, on each of them, in the order of the processes."""
    count = processes()[1]
    if count == 1:
        return rows
    parts = [None] * count
    torch.distributed.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)


def share_first(tensors: Iterable[torch.Tensor]) -> None:
    """Every process gets the tensors of the first one."""
    if processes()[1] > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)


# Samples of a stream -------------------------------------------------------------------------------------------------


class Reservoir:
    """Which of a stream of unknown length are kept so that all have the same chance (Vitter 1985, algorithm R).

    Args:
        size: how many are kept.
        generator: on the CPU.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size, self.generator, self.seen = size, generator, 0

    def places(self, count: int) -> dict[int, int]:
        """For the next `count` of the stream: {place in the sample: which of them takes it}. The i-th takes a random
        place of i, if it exists; of several for one place the last one stays."""
        position = torch.arange(self.seen, self.seen + count)
        random = (torch.rand(count, generator=self.generator) * (position + 1)).long()
        place = torch.where(position < self.size, position, random)
        kept = (place < self.size).nonzero().squeeze(1)
        self.seen += count
        return dict(zip(place[kept].tolist(), kept.tolist()))


def sample_of_latents(
    batches: Iterable, latents_of: Callable, size: int, dim: int, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    """A uniform sample of the latents of images, (at most `size`, `dim`).

    Args:
        batches: pixels, or dicts with `pixel_values`.
        latents_of: from pixels (B, channels, height, width) to latents (B, h * w, dim).
    """
    sample, reservoir = torch.empty(size, dim, device=device), Reservoir(size, generator)
    for batch in batches:
        latents = latents_of(pixels_of(batch, device)).flatten(0, 1).float()
        last = reservoir.places(len(latents))
        sample[list(last)] = latents[list(last.values())]
    return sample[: reservoir.seen]


def pixels_of(batch, device: torch.device) -> torch.Tensor:
    return (batch if isinstance(batch, torch.Tensor) else batch["pixel_values"]).to(device)


# Least squares -------------------------------------------------------------------------------------------------------


class Moments:
    """Sums over rows of numbers, of which mean and covariance are made, in float64.

    Args:
        width: numbers in a row.
        device: where the rows are.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.device = float64_device(device)
        self.count = torch.zeros((), dtype=torch.float64, device=self.device)
        self.sums = torch.zeros(width, dtype=torch.float64, device=self.device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=self.device)

    def add(self, rows: torch.Tensor) -> None:
        """Adds rows (N, width)."""
        rows = rows.to(self.device).double()
        self.count += len(rows)
        self.sums += rows.sum(0)
        self.products.addmm_(rows.T, rows)

    def join_processes(self) -> None:
        """Every process has the sums of all."""
        if processes()[1] > 1:
            for tensor in (self.count, self.sums, self.products):
                torch.distributed.all_reduce(tensor)

    @property
    def mean(self) -> torch.Tensor:
        return self.sums / self.count

    @property
    def covariance(self) -> torch.Tensor:
        return self.products / self.count - torch.outer(self.mean, self.mean)

    def regression(self, inputs: slice, targets: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Ridge regression of some columns onto others: weight (targets, inputs) and bias (targets,), float64."""
        covariance, mean = self.covariance, self.mean
        gram = covariance[inputs, inputs]
        gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram, covariance[inputs, targets]).T
        return weight, mean[targets] - weight @ mean[inputs]


@dataclass
class FusedLatents:
    """The projections of fused latents, float64: `project_in` and `project_out` as (weight, bias), and what the fit
    reached, see `VQRAEConfig.latents_fit`."""

    project_in: tuple[torch.Tensor, torch.Tensor]
    project_out: tuple[torch.Tensor, torch.Tensor]
    variance_kept: float
    pixels_psnr: float


def fuse(moments: Moments, layer: int, pixels: int, weight: float, dim: int, image_std: list[float]) -> FusedLatents:
    """Fused latents from the moments of [shallow layers, last layer, pixels of the patch].

    With `p` the ridge regression of the pixels on the shallow layers and `l` the last layer, `z = [l, s p]` with
    `s = weight * sqrt(var l / var p)`, total variances. Latents are the coordinates of `z` along its `dim` principal
    directions `V`, `u = V^T (z - mean z)`; and `[l, p]` comes back from them by least squares, which is `V u + mean z`
    with the pixels divided by `s`, since the coordinates are not correlated.

    Args:
        moments: of rows of those three, all processes' together.
        layer: width of the last layer.
        pixels: width of a patch: side * side * channels, channels last, normalised.
        weight: `pixel_weight`.
        dim: `codebook_dim`.
        image_std: of the normalised pixels, one for each channel.

    Raises:
        ValueError: images without any variance.
    """
    total = len(moments.sums)
    shallow, last, patch = (
        slice(0, total - pixels - layer),
        slice(total - pixels - layer, total - pixels),
        slice(total - pixels, total),
    )
    mean, covariance = moments.mean, moments.covariance
    if not covariance[patch, patch].diagonal().sum() > 1e-6 * pixels or not covariance.isfinite().all():
        raise ValueError(
            "Fused latents cannot be fitted: the pixels of all these images are the same, or not finite. Pass images "
            "that differ."
        )
    to_pixels, offset = moments.regression(shallow, patch)
    predicted = to_pixels @ covariance[shallow, shallow] @ to_pixels.T
    scale = weight * (covariance[last, last].diagonal().sum() / predicted.diagonal().sum()).sqrt()

    # z = mix [shallow, last] + (0, s offset)
    mix = torch.zeros(layer + pixels, last.stop, dtype=mean.dtype, device=mean.device)
    mix[:layer, last] = torch.eye(layer, dtype=mean.dtype, device=mean.device)
    mix[layer:, shallow] = scale * to_pixels
    features = slice(0, last.stop)
    variances, directions = torch.linalg.eigh(mix @ covariance[features, features] @ mix.T)  # ascending
    kept = variances[-dim:].sum() / variances.sum()
    directions = directions[:, -dim:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * largest.sign()  # an eigenvector has no sign of its own

    weight_in = directions.T @ mix
    back = torch.cat([directions[:layer], directions[layer:] / scale])
    center = torch.cat([mean[last], to_pixels @ mean[shallow] + offset])

    residual = (covariance[patch, patch] - 2 * to_pixels @ covariance[shallow, patch] + predicted).diagonal()
    std = torch.tensor(image_std, dtype=mean.dtype, device=mean.device).repeat(pixels // len(image_std))
    error = (residual.clamp_min(0) * std.square()).mean().item()
    return FusedLatents(
        project_in=(weight_in, -weight_in @ mean[features]),
        project_out=(back, center),
        variance_kept=kept.item(),
        pixels_psnr=-10 * math.log10(max(error, 1e-12)),
    )


def around(codes: torch.Tensor, grid: tuple[int, int], kernel_size: int) -> torch.Tensor:
    """The codes around each token, zero beyond the border: (h * w, dim) -> (h * w, dim * kernel_size**2), in the order
    of the weight of a convolution."""
    maps = codes.T.unflatten(1, grid)[None]
    return F.unfold(maps, kernel_size, padding=kernel_size // 2)[0].T


def fit_linear_path(
    samples: list[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]],
    codes_of: Callable,
    kernel_size: int,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares from the codes around a token to its patch.

    Args:
        samples: of this process, for each image its latents (h * w, dim), its patches (h * w, pixels), and (h, w).
        codes_of: from latents (1, h * w, dim) to their codes.
        kernel_size: codes in each direction.
        generator: draws the tokens that count where there are more than enough.

    Returns:
        Weight (pixels, dim, kernel_size, kernel_size) and bias (pixels,) of a convolution, float64.
    """
    latents, patches, _ = samples[0]
    dim, pixels = latents.shape[1], patches.shape[1]
    inputs = dim * kernel_size**2
    moments = Moments(inputs + pixels, device)
    tokens = sum(len(latents) for latents, _, _ in samples)
    share = 256 * inputs / processes()[1] / tokens  # so many rows determine a map well; more only cost time
    for latents, patches, grid in logging.tqdm(samples, desc="Linear path", unit="image"):
        rows = around(codes_of(latents[None].to(device))[0], grid, kernel_size)
        rows = torch.cat([rows, patches.to(rows)], dim=1)
        if share < 1:
            rows = rows[(torch.rand(len(rows), generator=generator) < share).to(rows.device)]
        moments.add(rows)
    moments.join_processes()
    weight, bias = moments.regression(slice(0, inputs), slice(inputs, inputs + pixels))
    return weight.unflatten(1, (dim, kernel_size, kernel_size)), bias
