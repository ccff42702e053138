"""The quantizers: exact search of the nearest code, k-means, SimVQ and a plain codebook.

Source: SimVQ (arXiv 2411.02038, github.com/youngsheen/SimVQ).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import logging


logger = logging.get_logger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# Nearest code
# ---------------------------------------------------------------------------------------------------------------------

# How much is computed at a time. A code is read from memory once for every tile of tokens, so 2,048 of them are enough
# to make any product compute-bound. On a CPU the 2,048 x 512 scores of a tile (4 MiB) stay in cache between the matrix
# product that writes them and the reduction that reads them; fewer tokens get more codes. A GPU hides the latency of
# launches and of the one synchronisation per tile behind larger ones (32 MiB).
_TILE_TOKENS = 2048
_TILE_SCORES = {"cpu": 2048 * 512}
_TILE_SCORES_ACCELERATOR = 8 * 2048 * 512

_NO_FLOAT64 = ("mps",)  # types of devices without it


def float64_device(device: torch.device) -> torch.device:
    """Where float64 arithmetic on tensors of a device is done: there, or on the CPU if it has none."""
    return torch.device("cpu") if device.type in _NO_FLOAT64 else device


def _products(device: torch.device):
    """PyTorch's settings of the matrix products of a device."""
    return (torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """fp32 products of fp32 operands, also where the user has allowed TF32 or bf16 for them."""
    products = _products(device)
    allowed = products.fp32_precision
    if allowed not in ("tf32", "bf16"):
        yield
        return
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = allowed


def _relative_error(dim: int, device: torch.device) -> float:
    """Bound on |computed - exact| / (|a| |b|) for a dot product of `dim` fp32 numbers (Higham 2002, section 3.1), with
    room for the additions around it, and for TF32 or bf16 products where the user has allowed them."""
    operand = {"tf32": 2.0**-10, "bf16": 2.0**-8}.get(_products(device).fp32_precision, 0.0)
    return 2 * operand + (dim + 8) * 2.0**-24


@torch.no_grad()
def nearest_codes(
    latents: torch.Tensor, codes: torch.Tensor, half_norms: torch.Tensor, mean: torch.Tensor
) -> torch.Tensor:
    r"""Index of the nearest code by L2 distance, as float64 arithmetic gives it; ties go to the lowest index.

    `argmin_i ||z - e_i||^2 = argmin_i (||e_i||^2 / 2 - z.e_i)`, searched in fp32 over tiles of tokens x codes with a
    running minimum, so memory does not grow with the number of either. A token whose best two scores are closer than
    twice the rounding error of fp32 is decided among the codes in that margin in float64; these few go to the CPU from
    a device that has no float64 (MPS), so that the indices are the same everywhere.

    Args:
        latents: (tokens, dim), float32.
        codes: (codes, dim), float32, minus `mean`: rounding errors grow with the norms, a common offset is none.
        half_norms: (codes,), float32, `||e_i||^2 / 2` of `codes`.
        mean: (dim,), float32.

    Returns:
        (tokens,), int64. 0 for a token with a NaN.
    """
    device = latents.device
    indices = torch.zeros(latents.shape[0], dtype=torch.int64, device=device)
    relative_error = _relative_error(latents.shape[1], device)
    tile_scores = _TILE_SCORES.get(device.type, _TILE_SCORES_ACCELERATOR)
    for start in range(0, latents.shape[0], _TILE_TOKENS):
        z = latents[start : start + _TILE_TOKENS] - mean
        found = _search_in_float32(z, codes, half_norms, tile_scores)
        indices[start : start + _TILE_TOKENS] = _decide_doubtful(
            z, codes, half_norms, *found, relative_error, tile_scores
        )
    return indices


def _search_in_float32(
    z: torch.Tensor, codes: torch.Tensor, half_norms: torch.Tensor, tile_scores: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index of the lowest score `||e||^2 / 2 - z.e` of each token, that score, and the next higher one: (tokens,) int64
    and twice float32."""
    num_codes, device = codes.shape[0], z.device
    index = torch.zeros(z.shape[0], dtype=torch.int64, device=device)
    best = torch.full((z.shape[0],), math.inf, device=device)
    runner_up = best.clone()
    width = max(1, tile_scores // z.shape[0])
    buffer = torch.empty(z.shape[0] * min(width, num_codes), device=device)
    for first in range(0, num_codes, width):
        tile = codes[first : first + width]
        scores = buffer[: z.shape[0] * tile.shape[0]].view(z.shape[0], tile.shape[0])
        torch.addmm(half_norms[first : first + width], z, tile.T, alpha=-1, out=scores)
        minimum = scores.amin(1)  # vectorized, where min with indices is not
        runner_up = torch.minimum(runner_up, torch.maximum(best, minimum))
        # Only tokens that found a nearer code need its index: in random order, about ln(number of tiles) times.
        rows = (minimum < best).nonzero().squeeze(1)
        if rows.numel():
            improved = scores[rows] if rows.numel() < z.shape[0] else scores
            values, columns = improved.min(1)
            improved.scatter_(1, columns[:, None], math.inf)
            runner_up[rows] = torch.minimum(runner_up[rows], improved.amin(1))
            best[rows] = values
            index[rows] = columns + first
    return index, best, runner_up


def _decide_doubtful(
    z: torch.Tensor,
    codes: torch.Tensor,
    half_norms: torch.Tensor,
    index: torch.Tensor,
    best: torch.Tensor,
    runner_up: torch.Tensor,
    relative_error: float,
    tile_scores: int,
) -> torch.Tensor:
    """`index` (tokens,), with float64's where rounding may have decided between the two lowest scores."""
    max_half_norm = half_norms.max()
    # |score error| <= relative_error * (||e||^2 / 2 + |z| |e|)
    margin = 2 * relative_error * (max_half_norm + z.norm(dim=1) * (2 * max_half_norm).sqrt())
    rows = (runner_up - best <= margin).nonzero().squeeze(1)
    if rows.numel():
        index[rows] = _decide_in_float64(z[rows], codes, half_norms, best[rows] + margin[rows], tile_scores)
    return index


def _decide_in_float64(
    z: torch.Tensor, codes: torch.Tensor, half_norms: torch.Tensor, threshold: torch.Tensor, tile_scores: int
) -> torch.Tensor:
    """The search of `nearest_codes` for a few tokens, in float64, among the codes whose fp32 score is at most
    `threshold` (tokens,)."""
    device = float64_device(z.device)
    exact_z = z.to(device).double()
    best = torch.full((z.shape[0],), math.inf, dtype=torch.float64, device=device)
    indices = torch.zeros(z.shape[0], dtype=torch.int64, device=device)
    norms = exact_z.norm(dim=1)
    width = max(1, tile_scores // (2 * max(z.shape)))  # all codes of a tile may be candidates, and are copied then
    for first in range(0, codes.shape[0], width):
        tile = codes[first : first + width]
        scores = torch.addmm(half_norms[first : first + width], z, tile.T, alpha=-1)
        candidates = scores <= threshold[:, None]
        rows, columns = candidates.any(1).nonzero().squeeze(1), candidates.any(0).nonzero().squeeze(1)
        if not rows.numel():
            continue
        near, rows, columns = tile[columns].to(device).double(), rows.to(device), columns.to(device)
        scores = torch.addmm(near.pow(2).sum(1) / 2, exact_z[rows], near.T, alpha=-1)
        minimum = scores.amin(1)
        # rounding of float64 itself, for codes as near as that: below this, two of them are equally near
        longest = norms[rows] + (2 * minimum + norms[rows] ** 2).clamp_min(0).sqrt()
        tie = (z.shape[1] + 8) * 2.0**-53 * (norms[rows] + longest) ** 2
        lowest = torch.where(scores <= (minimum + tie)[:, None], columns, codes.shape[0]).amin(1)
        nearer = minimum < best[rows] - tie
        rows = rows[nearer]
        best[rows], indices[rows] = minimum[nearer], lowest[nearer] + first
    return indices.to(z.device)


# One operator for `torch.compile` and `torch.export`, which do not look inside. Every copy of this file that a process
# loads (remote code of several checkpoints) uses the operator of the first: its name says what it computes.
if not hasattr(torch.ops.simvq, "nearest_codes"):
    # the CPU waits for numbers of tokens in doubt, which no CUDA graph can
    @torch.library.custom_op("simvq::nearest_codes", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
    def _nearest_codes_operator(
        latents: torch.Tensor, codes: torch.Tensor, half_norms: torch.Tensor, mean: torch.Tensor
    ) -> torch.Tensor:
        return nearest_codes(latents, codes, half_norms, mean)

    @_nearest_codes_operator.register_fake
    def _(latents, codes, half_norms, mean):
        return latents.new_empty(latents.shape[0], dtype=torch.int64)


@torch.no_grad()
def kmeans(samples: torch.Tensor, num_clusters: int, iterations: int, generator: torch.Generator) -> torch.Tensor:
    """Lloyd's algorithm from random samples, with the exact search of `nearest_codes`.

    Args:
        samples: (N, dim), float32, N >= `num_clusters`.
        num_clusters: number of centroids.
        iterations: assignments to make.
        generator: on the CPU; draws the first centroids and replaces centroids that got no sample by samples.

    Returns:
        (num_clusters, dim), float32, each the mean of the samples nearest to its predecessor.
    """
    device = float64_device(samples.device)
    order = torch.randperm(len(samples), generator=generator)[:num_clusters].to(samples.device)
    centroids = samples[order]
    for _ in logging.tqdm(range(iterations), desc=f"k-means, {num_clusters:,} codes of {len(samples):,} latents"):
        mean = centroids.mean(0)
        centered = centroids - mean
        nearest = nearest_codes(samples, centered, centered.square().sum(1) / 2, mean)
        counts = torch.bincount(nearest, minlength=num_clusters)
        sums = torch.zeros(num_clusters, samples.shape[1], dtype=torch.float64, device=device)
        for rows, part in zip(nearest.split(_TILE_TOKENS), samples.split(_TILE_TOKENS)):
            sums.index_add_(0, rows.to(device), part.to(device).double())
        centroids = (sums / counts.to(device).clamp_min(1)[:, None]).float().to(samples.device)
        empty = (counts == 0).nonzero().squeeze(1)
        drawn = torch.randint(len(samples), (len(empty),), generator=generator).to(samples.device)
        centroids[empty] = samples[drawn]  # more of them where the samples are dense
    return centroids


# ---------------------------------------------------------------------------------------------------------------------
# Quantizers
# ---------------------------------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """`z + (codes - z).detach()` without its rounding: the value is the code to the bit, the gradient goes to z."""

    @staticmethod
    def forward(ctx, z: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return codes.view_as(codes)

    @staticmethod
    def backward(ctx, grad_z_q: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_z_q, None


class InFloat32(nn.Module):
    """A module that is moved by `.half()` or `.to(torch.bfloat16)` of its model, but stays in fp32: for what decides
    tokens, since rounded codes are other codes. Parameters are made with `dtype=torch.float32`, whatever the default
    dtype, and its products are computed without autocast, TF32 and bf16."""

    def _apply(self, fn: Callable, recurse: bool = True):
        def kept(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(kept, recurse)


class Projection(InFloat32):
    """A linear layer in fp32; no `nn.Linear`, which 8- and 4-bit loading rounds.

    Args:
        in_features, out_features: widths.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=torch.float32))

    def forward(self, inputs: torch.Tensor, center: torch.Tensor | None = None) -> torch.Tensor:
        """`W inputs + b`, float32, (..., out_features); or, with `center` (in_features,), `W (inputs - center)` of (N,
        in_features): no copy of them is made, and no large b rounds them."""
        # settings are no part of a graph, in which the user's hold
        exact = nullcontext() if torch.compiler.is_compiling() else _exact_products(inputs.device)
        with torch.autocast(device_type=inputs.device.type, enabled=False), exact:
            if center is None:
                return F.linear(inputs.float(), self.weight, self.bias)
            return torch.addmm(-(self.weight @ center), inputs, self.weight.T)


class Codebook(nn.Embedding):
    """Learnable codes, in fp32 whatever the default dtype. They are read by calling the module, not by its `weight`:
    hooks that bring offloaded weights in (accelerate) run then."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype=torch.float32)

    def forward(self, indices: torch.Tensor | None = None) -> torch.Tensor:
        """All codes (num_embeddings, embedding_dim), or those of `indices` (*indices.shape, embedding_dim)."""
        return self.weight if indices is None else F.embedding(indices, self.weight)


class VectorQuantizer(InFloat32):
    """A plain learnable codebook (VQ-VAE, VQGAN), the baseline that collapses. Same API as [`SimVQ`].

    Args:
        num_embeddings: number of codes.
        embedding_dim: width of a code.
        commitment_cost: beta, see [`SimVQ`].
        legacy: form of the loss, see [`SimVQ`].
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, commitment_cost: float = 0.25, legacy: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("num_embeddings", num_embeddings), ("embedding_dim", embedding_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.commitment_cost = commitment_cost
        self.legacy = legacy
        # tokens per code, and latents with NaN or infinity, since the last reset
        self.register_buffer("_counts", torch.zeros(num_embeddings, dtype=torch.int64), persistent=False)
        self.register_buffer("_num_nonfinite", torch.zeros((), dtype=torch.int64), persistent=False)
        self._cache = None  # what the search needs of the codes, kept in eval mode
        self._build()
        self.reset_parameters()

    def _build(self) -> None:
        self.embedding = Codebook(self.num_embeddings, self.embedding_dim)

    def reset_parameters(self) -> None:
        """Uniform in +-1 / num_embeddings, as VQGAN does."""
        init.uniform_(self.embedding.weight, -1 / self.num_embeddings, 1 / self.num_embeddings)

    def project(self, codes: torch.Tensor) -> torch.Tensor:
        """Rows of the codebook (..., embedding_dim) as they are compared with latents and emitted."""
        return codes

    def _centered_codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All projected codes minus their mean (num_embeddings, embedding_dim), and that mean (embedding_dim,)."""
        codes = self.embedding()
        mean = codes.mean(0)
        return codes - mean, mean

    def _sources(self) -> list[torch.Tensor]:
        """The small tensors on which the projected codes depend, besides the codebook."""
        return []

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""Quantizes latents.

        Args:
            z: (B, C, H, W) or (B, N, C) with C = `embedding_dim`, floating point.

        Returns:
            z_q: shaped like `z` and of its dtype: the nearest codes, with the gradient passed straight through to `z`.
            vq_loss: scalar, float32; gradients go to `z` and to the codes.
            indices: (B, H, W) or (B, N), int64.

        Raises:
            ValueError: `z` has another layout or width or is not floating point. (Tokens with NaN or infinity get code
                0 and are counted: `get_num_nonfinite`. In eval mode a warning says so.)
        """
        if z.ndim not in (3, 4) or not z.is_floating_point():
            raise ValueError(
                f"z must be floating point of shape (B, C, H, W) or (B, N, C), got {z.dtype} of {tuple(z.shape)}."
            )
        last = z.permute(0, 2, 3, 1) if z.ndim == 4 else z
        if last.shape[-1] != self.embedding_dim:
            raise ValueError(
                f"z has {last.shape[-1]} channels (shape {tuple(z.shape)}), but embedding_dim is {self.embedding_dim}."
            )
        # fp32 whatever the autocast: in bf16 the nearest code is often another one
        with torch.autocast(device_type=z.device.type, enabled=False):
            flat = last.reshape(-1, self.embedding_dim).float()
            indices = self._search(flat.detach())
            # the gradient of the projection comes from the chosen rows alone
            codes = self.project(self.embedding(indices))
            to_z = F.mse_loss(flat, codes.detach())
            # the same number; only its gradient is another one
            to_codes = F.mse_loss(codes, flat.detach()) if codes.requires_grad else to_z.detach()
            if self.legacy:
                vq_loss = to_z + self.commitment_cost * to_codes
            else:
                vq_loss = self.commitment_cost * to_z + to_codes
            z_q = StraightThrough.apply(flat, codes)
        z_q = z_q.to(z.dtype).reshape(last.shape)
        if z.ndim == 4:
            z_q = z_q.permute(0, 3, 1, 2).contiguous()
        return z_q, vq_loss, indices.reshape(last.shape[:-1])

    @torch.no_grad()
    def _search(self, flat: torch.Tensor) -> torch.Tensor:
        nonfinite = (~torch.linalg.vector_norm(flat, ord=math.inf, dim=1).isfinite()).sum()  # no copy of flat
        self._num_nonfinite += nonfinite
        if not self.training and not torch.compiler.is_compiling() and nonfinite:  # a graph cannot ask
            logger.warning_once(
                f"{nonfinite.item()} of {flat.shape[0]} latents hold NaN or infinity and get code 0 (said once; "
                "get_num_nonfinite() counts them): check the dtype of the encoder, fp16 overflows where bf16 does not."
            )
        indices = torch.ops.simvq.nearest_codes(flat, *self._search_table())
        # An exported program has no quantizer to count for. Dynamo of torch 2.9 takes every graph for an exported one.
        if torch.compiler.is_dynamo_compiling() or not torch.compiler.is_exporting():
            self.count_codes(indices)
        return indices

    def _search_table(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Centred codes, half their squared norms, and their mean; in eval mode computed once and then reused.

        The cache is valid while the codebook is the same tensor at the same version and the parameters of the
        projection have the same values, which are compared: they are small, and an edit through `.data` bumps no
        version. A graph computes the table anew, and so does a quantizer whose weights come and go (offloaded to the
        CPU or the disk).
        """
        if torch.compiler.is_compiling():
            return self._new_table()
        weight, sources = self.embedding.weight, self._sources()
        version = None if weight.is_inference() else weight._version
        cache = self._cache  # read once: another thread may replace it
        if cache is not None and cache[0] is weight and cache[1] == version:
            if all(a.device == b.device and torch.equal(a, b) for a, b in zip(cache[2], sources)):
                return cache[3]
        self._cache = cache = None  # before the new table is made: never two at a time
        table = self._new_table()
        if not self.training and not any(tensor.is_meta for tensor in (weight, *sources)):
            self._cache = weight, version, [source.detach().clone() for source in sources], table
        return table

    def _new_table(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes, mean = self._centered_codes()
        return codes, torch.linalg.vector_norm(codes, dim=1).square_().div_(2), mean

    def train(self, mode: bool = True):
        if mode:
            self._cache = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        # copies and pickles start with neither a cache nor counts
        counts = {name: torch.zeros_like(self._buffers[name]) for name in ("_counts", "_num_nonfinite")}
        return {**self.__dict__, "_cache": None, "_buffers": {**self._buffers, **counts}}

    def get_codebook_entry(self, indices: torch.Tensor) -> torch.Tensor:
        """Projected codes, i.e. what `forward` emits (the reference forgets the projection here).

        Args:
            indices: integers of any shape, each in [0, num_embeddings).

        Returns:
            (*indices.shape, embedding_dim), float32.

        Raises:
            ValueError: not integers, or out of range.
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ValueError(f"Code indices must be integers, got {indices.dtype}.")
        checked = indices.numel() and not torch.compiler.is_compiling()  # a graph cannot ask
        if checked and not (0 <= indices.min() and indices.max() < self.num_embeddings):
            raise ValueError(
                f"Code indices must be in [0, {self.num_embeddings}), got values from {indices.min().item()} to "
                f"{indices.max().item()}. Were special tokens or a vocabulary offset left in?"
            )
        with torch.autocast(device_type=indices.device.type, enabled=False):
            return self.project(self.embedding(indices.long()))

    def count_codes(self, indices: torch.Tensor) -> None:
        """Counts tokens (int64, of any shape) that did not come from `forward`, which counts its own."""
        indices = indices.flatten()
        self._counts.index_add_(0, indices, torch.ones_like(indices))

    def get_codebook_counts(self) -> torch.Tensor:
        """(num_embeddings,) int64: tokens that each code has been given since `reset_codebook_usage`, on this rank."""
        return self._counts.clone()

    def get_codebook_usage(self) -> float:
        """Share of the codes, in [0, 1], that were used at least once since `reset_codebook_usage`, on this rank."""
        return self.get_codebook_counts().count_nonzero().item() / self.num_embeddings

    def get_num_nonfinite(self) -> int:
        """Latents with NaN or infinity since `reset_codebook_usage`, on this rank."""
        return self._num_nonfinite.item()

    def reset_codebook_usage(self) -> None:
        """Starts the counts anew. They are not part of checkpoints, copies or pickles."""
        self._counts.zero_()
        self._num_nonfinite.zero_()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, beta={self.commitment_cost}, legacy={self.legacy}"


class FrozenCodebook(nn.Module):
    """A [`Codebook`] whose codes are a buffer, so that no optimizer ever sees them: `from_pretrained` makes every
    *parameter* trainable again. Named as an `nn.Embedding`, for the reference's key `embedding.weight`."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(num_embeddings, embedding_dim, dtype=torch.float32))

    forward = Codebook.forward


class SimVQ(VectorQuantizer):
    r"""A frozen Gaussian codebook seen through one learnable linear layer (arXiv 2411.02038).

    Codes are `e_i = W c_i + b` with `c_i` drawn once from N(0, 1 / embedding_dim). The index is
    `argmin_i ||z - e_i||^2`, plain L2, and the output is `e_index` with a straight-through gradient. With `sg` for
    stop-gradient, `z_q` for `e_index`, and means over all elements, the loss is

    - `legacy=True` (the reference class): `mean((sg[z_q] - z)^2) + beta * mean((z_q - sg[z])^2)`
    - `legacy=False` (the reference's published configurations, and what "commitment cost" means in the literature):
      `beta * mean((sg[z_q] - z)^2) + mean((z_q - sg[z])^2)`

    The state dict has the reference's names: `embedding.weight`, `embedding_proj.weight`, `embedding_proj.bias`.

    Args:
        num_embeddings: number of codes.
        embedding_dim: width of a code.
        commitment_cost: beta, 0.25 in the paper.
        legacy: form of the loss, see above.

    Example:

    ```python
    >>> import torch
    >>> from modeling_simvq import SimVQ

    >>> quantizer = SimVQ(num_embeddings=1024, embedding_dim=32)
    >>> z_q, vq_loss, indices = quantizer(torch.randn(2, 32, 16, 16))
    >>> z_q.shape, indices.shape
    (torch.Size([2, 32, 16, 16]), torch.Size([2, 16, 16]))
    >>> torch.allclose(quantizer.get_codebook_entry(indices).permute(0, 3, 1, 2), z_q, atol=1e-6)
    True

    ```"""

    def _build(self) -> None:
        self.embedding = FrozenCodebook(self.num_embeddings, self.embedding_dim)
        self.embedding_proj = Projection(self.embedding_dim, self.embedding_dim)

    def reset_parameters(self) -> None:
        """The reference's: N(0, 1 / d) codes and the default `nn.Linear`. What a checkpoint has filled stays.

        The codes are the same ones whatever the seed and the device, so that all processes agree on what none of them
        trains.
        """
        weight = self.embedding.weight
        if not weight.is_meta:
            codes = torch.empty(weight.shape).normal_(generator=torch.Generator().manual_seed(0))
            init.copy_(weight, codes * self.embedding_dim**-0.5)
        init.kaiming_uniform_(self.embedding_proj.weight, a=math.sqrt(5))
        bound = self.embedding_dim**-0.5
        init.uniform_(self.embedding_proj.bias, -bound, bound)

    @torch.no_grad()
    def fit(self, samples: torch.Tensor, iterations: int = 8, seed: int = 0) -> None:
        r"""Makes the codes the k-means centroids of `samples`, split into a frozen codebook of whitened centroids and
        a W and b that un-whiten them.

        With the samples' mean `m` and covariance `S`, a centroid `k` becomes the codebook entry
        `c = S^-1/2 (k - m) / sqrt(dim)`, and `W = sqrt(dim) S^1/2`, `b = m`, so that `W c + b = k`: entries have the
        scale of the Gaussian ones. Where every code is the mean of the latents nearest to it, the loss of the codebook
        has no gradient in W and b. Our choice; after it the codebook is as frozen as before.

        Args:
            samples: (N, embedding_dim), floating point, N >= num_embeddings; 16 to 32 a code are enough.
            iterations: of k-means.
            seed: of the draw of the first centroids.

        Raises:
            ValueError: fewer samples than codes, another width, or NaN or infinity among them.
        """
        if samples.ndim != 2 or samples.shape[1] != self.embedding_dim:
            raise ValueError(f"samples must be (N, {self.embedding_dim}), got {tuple(samples.shape)}.")
        if len(samples) < self.num_embeddings:
            raise ValueError(
                f"{len(samples)} latents cannot initialize {self.num_embeddings} codes: pass more images, or have "
                "fewer codes."
            )
        if not samples.isfinite().all():
            raise ValueError("The latents hold NaN or infinity: check the pixels, and the dtype of the encoder.")
        with torch.autocast(device_type=samples.device.type, enabled=False):
            samples = samples.float()
            centroids = kmeans(samples, self.num_embeddings, iterations, torch.Generator().manual_seed(seed))
            mean, device = samples.mean(0), float64_device(samples.device)
            covariance = sum(
                ((part - mean).T @ (part - mean)).to(device).double() for part in samples.split(_TILE_TOKENS)
            )
            variances, directions = torch.linalg.eigh(covariance / len(samples))
            # directions without variance (LayerNorm leaves one) are left alone, not blown up
            scale = (variances.clamp_min(1e-6 * variances[-1].clamp_min(1e-12)) * self.embedding_dim).sqrt()
            weight = (directions * scale) @ directions.T
            whiten = (directions / scale) @ directions.T
            for start in range(0, len(centroids), _TILE_TOKENS):
                rows = slice(start, start + _TILE_TOKENS)
                whitened = (centroids[rows] - mean).to(device).double() @ whiten
                self.embedding.weight[rows] = whitened.to(self.embedding.weight)
            self.embedding_proj.weight.copy_(weight)
            self.embedding_proj.bias.copy_(mean)
        self.reset_codebook_usage()

    def project(self, codes: torch.Tensor) -> torch.Tensor:
        return self.embedding_proj(codes)

    def _centered_codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        codes = self.embedding()
        mean = codes.mean(0)
        return self.embedding_proj(codes, center=mean), self.project(mean)

    def _sources(self) -> list[torch.Tensor]:
        return [self.embedding_proj.weight, self.embedding_proj.bias]


__all__ = ["Projection", "SimVQ", "VectorQuantizer", "kmeans", "nearest_codes"]
