#!/usr/bin/env python
"""A candidate for the search of the nearest code on a GPU: one fused Triton kernel. Nothing but the benchmark uses it.

It has not been run on a GPU: it is tested under Triton's interpreter on a CPU, and compiled for GPUs that were not
there. On a GPU machine one command compares it with the tiles of quantization_simvq.py, the bare products and
`vector_quantize_pytorch.SimVQ`, and says whether it enters quantization_simvq.py: where the tiles are within a tenth of
the kernel, no kernel, since less code wins.

    python -m benchmarks.quantizer --sections kernel --device cuda
    TRITON_PRINT_AUTOTUNING=1 python -m benchmarks.quantizer --sections kernel --device cuda   # and the blocks it chose

A program has a block of tokens and goes through codes block by block; the scores stay in registers, reduced to each
token's lowest score, its code, and the next higher score. This command says what the compiler makes of every choice of
blocks, for GPUs that need not be here (90: H100; 80: A100; their programs have at most 232,448 and 166,912 bytes of
shared memory):

    python -m benchmarks.triton_search --capabilities 80 90 --dim 128
"""

import math
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl

from eval.commands import CommandParser, ends_in_one_line
from quantization_simvq import _TILE_SCORES_ACCELERATOR, _decide_doubtful, _relative_error


INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1, before Triton is imported
_INTERPRETED = tl.constexpr(INTERPRETED)

# Blocks to choose from, by time: tokens, codes, depth of a product, warps, stages. None of them spills on an H100.
BLOCKS = {
    "ieee": [(128, 64, 32, 8, 3), (64, 128, 16, 8, 3), (64, 64, 16, 4, 3)],
    "tf32x3": [(128, 64, 128, 8, 1), (64, 64, 128, 4, 2), (128, 128, 32, 8, 3), (64, 64, 32, 8, 3)],
    "bf16x3": [
        (128, 128, 128, 8, 2),
        (128, 256, 128, 8, 1),
        (128, 64, 128, 4, 2),
        (64, 64, 128, 4, 3),
        (128, 64, 32, 8, 3),
    ],
}
_LARGEST_DEPTH = 128  # of them
_TOKENS = 16384  # at a time, for memory that does not grow with their number
# With few tokens the codes are parted among programs too: enough of these for 4 x 128 programs of 128 tokens.
_PARTED_TOKENS = 65536
_LEAST_CODES = 1024  # of a part


def relative_error(dim: int, precision: str, device: torch.device) -> float:
    """Bound on |computed - exact| / (||e||^2 / 2 + |z| |e|) for a score of the kernel, to first order, and at least
    that of the products by which `_decide_doubtful` finds its candidates.

    "ieee": the products are fp32's, with the bound of quantization_simvq.py. The others:

    - A number is split as x = h + m + r with |m| <= u |x| and |r| <= u^2 |x|: u = 2^-8 for bfloat16, which is rounded,
      and 2^-10 for TF32, which is cut off, m by the hardware. The products h h', h m' and m h' leave out m m', r x' and
      x r': 3 u^2 |x x'|, taken as 4.
    - A tensor core adds k >= 4 exact products to its accumulator at once, each aligned to the largest of them and cut
      off at no less than 24 bits, and so is their sum (Fasi, Higham, Mikaitis and Pranesh 2021): k + 2 errors of at
      most 2^-23 times the largest, which is no larger than |z| |e| over the depth of a block. Three products of a
      depth of K: 3 (K / k) (k + 2) 2^-23 <= 9 K 2^-24, taken as 10 (K + 8). Every block starts from zero, so that by
      Cauchy and Schwarz this holds for K = 128 whatever the dimensions.
    - fp32 rounds ||e||^2 / 2 and the subtraction of each block's products, fewer than `dim` times 2^-24.
    """
    plain = _relative_error(dim, device)
    if precision == "ieee":
        return plain
    unit = {"tf32x3": 2.0**-10, "bf16x3": 2.0**-8}[precision]
    return max(plain, 4 * unit**2 + (10 * (min(dim, _LARGEST_DEPTH) + 8) + dim) * 2.0**-24)


def split(x: torch.Tensor, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 numbers as sums of two that tensor cores multiply (float32 of TF32's bits, or bfloat16); as themselves
    for "ieee", which uses the first alone."""
    if precision == "ieee":
        return x, x
    high = x.bfloat16() if precision == "bf16x3" else (x.view(torch.int32) & -(2**13)).view(torch.float32)
    return high, (x - high).to(high.dtype)


@triton.jit
def _block(pointer, rows, num_rows, depth, DIM: tl.constexpr):
    """(rows, depth) of a matrix of DIM columns, zero outside."""
    inside = (rows < num_rows)[:, None] & (depth < DIM)[None, :]
    block = tl.load(pointer + rows.to(tl.int64)[:, None] * DIM + depth[None, :], mask=inside, other=0.0)
    return block.to(tl.float32) if _INTERPRETED else block  # the interpreter has no products of bfloat16


@triton.jit
def _two_lowest(
    z_high,
    z_low,
    codes_high,
    codes_low,
    half_norms,
    found_index,
    found_best,
    found_runner_up,
    num_tokens,
    num_codes,
    codes_per_part,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    CODES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Of a block of tokens and a part of the codes; all matrices are contiguous."""
    rows, part = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    end = tl.minimum((part + 1) * codes_per_part, num_codes)
    best = tl.full((TOKENS,), float("inf"), tl.float32)
    runner_up = best
    index = tl.zeros((TOKENS,), tl.int32)
    for first in range(part * codes_per_part, end, CODES):
        columns = first + tl.arange(0, CODES)
        scores = tl.load(half_norms + columns, mask=columns < end, other=float("inf"))
        scores = tl.broadcast_to(scores[None, :], (TOKENS, CODES))
        for start in range(0, DIM, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            z = _block(z_high, rows, num_tokens, depth, DIM)
            codes = tl.trans(_block(codes_high, columns, end, depth, DIM))
            if SPLIT:  # the small products first
                z_rest = _block(z_low, rows, num_tokens, depth, DIM)
                codes_rest = tl.trans(_block(codes_low, columns, end, depth, DIM))
                products = tl.dot(z_rest, codes, input_precision="tf32")
                products = tl.dot(z, codes_rest, products, input_precision="tf32")
                products = tl.dot(z, codes, products, input_precision="tf32")
            else:
                products = tl.dot(z, codes, input_precision="ieee")
            scores -= products  # subtracted: the compiler makes one accumulation of products that are added
        minimum = tl.min(scores, 1)
        place = tl.min(tl.where(scores == minimum[:, None], columns[None, :], num_codes), 1)
        second = tl.min(tl.where(columns[None, :] == place[:, None], float("inf"), scores), 1)
        runner_up = tl.minimum(tl.minimum(runner_up, second), tl.maximum(best, minimum))
        index = tl.where(minimum < best, place, index)  # of equal scores that of the lowest index
        best = tl.minimum(best, minimum)
    found = part.to(tl.int64) * num_tokens + rows
    tl.store(found_index + found, index, mask=rows < num_tokens)
    tl.store(found_best + found, best, mask=rows < num_tokens)
    tl.store(found_runner_up + found, runner_up, mask=rows < num_tokens)


def fastest_kernel(choices: list[tuple[int, ...]]):
    """The kernel, with whichever of the blocks is fastest for a number of codes and dimensions."""
    names = "TOKENS", "CODES", "DEPTH"
    configs = [triton.Config(dict(zip(names, sizes)), num_warps=w, num_stages=s) for *sizes, w, s in choices]
    return triton.autotune(configs, key=["num_codes", "DIM"])(_two_lowest)


KERNELS = {  # the interpreter cannot tell which is fastest
    precision: fastest_kernel(choices[:1] if INTERPRETED else choices) for precision, choices in BLOCKS.items()
}


def two_lowest_scores(
    z: torch.Tensor, codes: torch.Tensor, half_norms: torch.Tensor, precision: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the tiles of quantization_simvq.py find (`_search_in_float32`), by the kernel.

    Args:
        z: (tokens, dim), float32.
        codes: (codes, dim), float32.
        half_norms: (codes,), float32, `||e||^2 / 2`.
        precision: of the products, a key of `BLOCKS`: "ieee" is fp32; "tf32x3" and "bf16x3" are three products of
            numbers split in two, on tensor cores.

    Returns:
        Index of each token's lowest score `||e||^2 / 2 - z.e`, that score, and the next higher one: (tokens,) int64 and
        twice float32, within `relative_error`. Of equal scores the lowest index; 0 for a token with a NaN.
    """
    z, codes = z.contiguous(), codes.contiguous()  # a grid of latents comes with its channels first
    (num_tokens, dim), num_codes = z.shape, codes.shape[0]
    codes_per_part = max(_LEAST_CODES, triton.cdiv(num_codes * num_tokens, _PARTED_TOKENS))
    parts = triton.cdiv(num_codes, codes_per_part)
    index = torch.empty(parts, num_tokens, dtype=torch.int32, device=z.device)
    best, runner_up = (torch.empty(parts, num_tokens, device=z.device) for _ in range(2))
    with torch.cuda.device_of(z):
        KERNELS[precision][lambda chosen: (triton.cdiv(num_tokens, chosen["TOKENS"]), parts)](
            *split(z, precision), *split(codes, precision), half_norms, index, best, runner_up,
            num_tokens, num_codes, codes_per_part, DIM=dim, SPLIT=precision != "ieee",
        )  # fmt: skip
    lowest = best.amin(0)
    chosen = torch.where(best == lowest, index, num_codes).amin(0)
    others = best.masked_fill(index == chosen, math.inf)  # the lowest scores of the other parts
    return chosen.long(), lowest, torch.minimum(others, runner_up).amin(0)


@torch.no_grad()
def nearest_codes(
    latents: torch.Tensor, codes: torch.Tensor, half_norms: torch.Tensor, mean: torch.Tensor, precision: str
) -> torch.Tensor:
    """`quantization_simvq.nearest_codes` by the kernel: arguments, result, and decision of the doubtful are its."""
    indices = torch.zeros(latents.shape[0], dtype=torch.int64, device=latents.device)
    error = relative_error(latents.shape[1], precision, latents.device)
    for start in range(0, latents.shape[0], _TOKENS):
        z = latents[start : start + _TOKENS] - mean
        found = two_lowest_scores(z, codes, half_norms, precision)
        indices[start : start + _TOKENS] = _decide_doubtful(
            z, codes, half_norms, *found, error, _TILE_SCORES_ACCELERATOR
        )
    return indices


def compiled(capability: int, dim: int, precision: str, blocks: tuple[int, ...]) -> tuple[int, int, int]:
    """Registers of a thread, bytes of a thread that did not fit into them, and bytes of shared memory of a program, for
    a GPU of this compute capability (90 is 9.0)."""
    *sizes, warps, stages = blocks
    constants = dict(zip(("DIM", "SPLIT", "TOKENS", "CODES", "DEPTH"), (dim, precision != "ieee", *sizes)))
    matrix = "*bf16" if precision == "bf16x3" else "*fp32"
    types = [*[matrix] * 4, "*fp32", "*i32", "*fp32", "*fp32", "i32", "i32", "i32", *["constexpr"] * len(constants)]
    source = triton.compiler.ASTSource(
        _two_lowest,
        signature=dict(zip(_two_lowest.arg_names, types)),
        constexprs=constants,
        attrs={(number,): [["tt.divisibility", 16]] for number in range(len(types) - len(constants))},
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers, stack, kernel.metadata.shared


parser = CommandParser(__doc__)
parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90], help="Of the GPUs (default: 80 90).")
parser.add_argument("--dim", type=int, default=128, help="Width of a code (default: 128).")


def main() -> None:
    args = parser.parse_args()
    print("| GPU | products | tokens, codes, depth, warps, stages | registers | bytes spilled | bytes shared |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for capability in args.capabilities:
        for precision, choices in BLOCKS.items():
            for blocks in choices:
                usage = " | ".join(map("{:,}".format, compiled(capability, args.dim, precision, blocks)))
                print(f"| sm_{capability} | {precision} | {', '.join(map(str, blocks))} | {usage} |", flush=True)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
