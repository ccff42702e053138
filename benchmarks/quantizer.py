#!/usr/bin/env python
"""Time and memory of SimVQ against other ways to compute the same thing.

    python -m benchmarks.quantizer                          # everything, about 20 minutes on 2 cores
    python -m benchmarks.quantizer --sections table --rows 2048,65536,128
    python -m benchmarks.quantizer --sections kernel --device cuda

Sections:

table   forward in eval mode, forward in training, and forward + backward, against the reference's formula (written out
        below; github.com/youngsheen/SimVQ, taming/modules/vqvae/quantize.py), `vector_quantize_pytorch.SimVQ` without
        the rotation trick, and the floor: the bare fp32 matrix products, in tiles that are written and never read.
growth  time and memory of ours over the number of codes and of tokens, as a plot.
model   the quantizer's share of `encode` beside a SigLIP2-so400m-sized encoder (random weights), and the memory of a
        training step of the quick-start model with 262,144 codes.
tried   what was not kept: the rate of bf16 products (for a shortlist), torch.compile of a tile, and norms of the codes
        through a triangular factor of W instead of their projection.
kernel  on a GPU with Triton: the candidate of benchmarks/triton_search.py, in three kinds of products, beside our tiles
        (and with TF32 allowed), the library, and bare `torch.matmul` in each arithmetic; whether the candidate is worth
        its code. Not run on a GPU yet; TRITON_INTERPRET=1 rehearses it on a CPU, with --rows 64,128,8.

Every method runs in a process of its own. The processes of a row take turns, one step each, so that all meet the same
machine; given are medians. Memory is the peak of the first step above what the process held before it (codebook and
input), resident memory on a CPU and allocated memory on a GPU. "scratch" is that without outputs, gradients and the
projected codebook.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.measuring import name_of, now, timed
from eval.commands import CommandParser, ends_in_one_line
from eval.files import write_whole
from eval.options import present_device


ROOT = Path(__file__).resolve().parents[1]


ROWS = ["4096,1024,128", "4096,16384,256", "2048,16384,1536", "2048,65536,128", "2048,262144,128", "16384,262144,128"]
MODES = {"eval": "forward, eval", "train": "forward, training", "step": "forward + backward"}
METHODS = {"reference": 5, "library": 2, "floor": 0, "ours": 0}  # copies of the tokens x codes matrix at the peak


KERNEL_ROWS = ["16384,65536,128", "16384,262144,128"]
PRODUCTS = {"ieee": ("fp32", 1), "tf32x3": ("tf32", 3), "bf16x3": ("bf16", 3)}  # of the kernel: arithmetic, how many


# What is measured, each as a function that runs one step -------------------------------------------------------------


class Reference(torch.nn.Module):
    """The formula of the SimVQ reference, with the whole distance matrix."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.randn(codes, dim) * dim**-0.5)
        self.projection = torch.nn.Linear(dim, dim)

    def forward(self, z):
        projected = self.projection(self.codebook)
        distances = (
            z.pow(2).sum(1, keepdim=True) + projected.pow(2).sum(1) - 2 * torch.einsum("bd,nd->bn", z, projected)
        )
        indices = distances.argmin(1)
        z_q = F.embedding(indices, projected)
        loss = 0.25 * (z_q.detach() - z).pow(2).mean() + (z_q - z.detach()).pow(2).mean()
        return z + (z_q - z).detach(), loss, indices


def quantizer_step(method: str, mode: str, tokens: int, codes: int, dim: int, device: torch.device):
    torch.manual_seed(0)
    z = torch.randn(tokens, dim, device=device)
    if method == "floor":
        return floor_step(mode, z, codes)
    if method.startswith("product "):
        return product_step(method.split()[1], z, codes)
    if method == "ours tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    if method.startswith("kernel "):
        import quantization_simvq
        from benchmarks import triton_search

        quantization_simvq.nearest_codes = functools.partial(triton_search.nearest_codes, precision=method.split()[1])
    if method.startswith(("ours", "kernel ")):
        from modeling_simvq import SimVQ

        quantizer = SimVQ(codes, dim, legacy=False).to(device)
        run = lambda: quantizer(z[None])[:2]  # noqa: E731
    elif method == "reference":
        quantizer = Reference(codes, dim).to(device)
        run = lambda: quantizer(z)[:2]  # noqa: E731
    else:
        from vector_quantize_pytorch import SimVQ as LibrarySimVQ

        quantizer = LibrarySimVQ(dim, codes, rotation_trick=False).to(device)
        run = lambda: quantizer(z[None])[::2]  # noqa: E731
    quantizer.train(mode != "eval")
    z.requires_grad_(mode != "eval")

    def step():
        if mode == "eval":
            with torch.no_grad():
                return run()
        quantized, loss = run()
        if mode == "step":
            quantizer.zero_grad()
            z.grad = None
            (quantized.mean() + loss).backward()

    return step


def floor_step(mode: str, z: torch.Tensor, codes: int):
    """The products alone. The tiles' size is the fastest of those tried on a CPU; the whole matrix takes longer."""
    tokens, dim = z.shape
    codebook, weight = torch.randn(codes, dim, device=z.device), torch.randn(dim, dim, device=z.device)
    projected, chosen = torch.empty_like(codebook), torch.empty_like(z)
    height, width = (2048, 512) if z.device.type == "cpu" else (2048, 4096)
    buffer = torch.empty(height * width, device=z.device)

    @torch.no_grad()
    def step():
        if mode != "eval":
            torch.mm(codebook, weight.T, out=projected)
        for start in range(0, tokens, height):
            tile = z[start : start + height]
            for first in range(0, codes, width):
                part = projected[first : first + width]
                torch.mm(tile, part.T, out=buffer[: len(tile) * len(part)].view(len(tile), len(part)))
        if mode == "step":  # the chosen rows, and the gradient of the projection from them
            torch.mm(z, weight.T, out=chosen)
            torch.mm(z.T, chosen)

    return step


def product_step(arithmetic: str, z: torch.Tensor, codes: int):
    """A bare `torch.matmul` of tokens and all codes, 2,048 tokens at a time for its memory."""
    codebook = torch.randn(codes, z.shape[1], device=z.device)
    if arithmetic == "bf16":
        z, codebook = z.bfloat16(), codebook.bfloat16()
    if arithmetic == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"

    @torch.no_grad()
    def step():
        for tile in z.split(2048):
            torch.matmul(tile, codebook.T)

    return step


def results_in_bytes(mode: str, tokens: int, codes: int, dim: int) -> int:
    """Outputs (quantized, int64 indices), gradients (z, W, b), the projected codebook with its norms."""
    gradients = tokens * dim + dim * dim + dim if mode == "step" else 0
    return 4 * (tokens * (dim + 2) + gradients + codes * (dim + 1))


def training_step(codes: int):
    """A step of the quick-start model with AdamW, batch 32 at 64 px."""
    from modeling_simvq import VQRAEConfig, VQRAEModel

    recipe = json.loads((ROOT / "configs" / "from_scratch_64.json").read_text())
    torch.manual_seed(0)
    model = VQRAEModel(VQRAEConfig(**{**recipe["model_config"], "codebook_size": codes})).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    size = model.config.image_size
    pixels = torch.rand(recipe["per_device_train_batch_size"], model.config.num_channels, size, size)

    def step():
        model(pixels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# A process a method --------------------------------------------------------------------------------------------------


def status(field: str) -> float:
    """MB of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024 / 1e6


def peak_above_baseline(step, device: torch.device) -> float | None:
    """MB; `None` where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        baseline = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - baseline) / 1e6
    if not os.path.exists("/proc/self/clear_refs"):
        step()
        return None
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
    baseline = status("VmRSS")
    step()
    return status("VmHWM") - baseline


def worker(task: dict) -> None:
    """Builds, loads the kernels with a small step, then: one line with the peak, and one with seconds per request (the
    mean of as many steps as fill a fifth of a second)."""
    device = torch.device(task["device"])
    if "training_step" in task:
        step = training_step(task["training_step"])
    else:
        arguments = [task[name] for name in ("method", "mode", "tokens", "codes", "dim")]
        if task["method"].startswith("kernel "):
            quantizer_step(*arguments, device)()  # chooses its blocks for this size
        else:
            quantizer_step(task["method"], task["mode"], 64, 64, task["dim"], device)()
        step = quantizer_step(*arguments, device)
    peak = peak_above_baseline(step, device)
    print(json.dumps({"peak": peak, "process": None if peak is None else status("VmHWM")}), flush=True)
    steps = math.ceil(0.2 / timed(step, device))

    def so_many() -> None:
        for _ in range(steps):
            step()

    for _ in sys.stdin:
        print(json.dumps({"seconds": timed(so_many, device) / steps}), flush=True)


def side_by_side(tasks: dict[str, dict], repeats: int, progress) -> dict[str, dict]:
    """Runs the tasks in turns; for each the peak memory in MB and the median of the seconds."""
    processes = {}
    memory, seconds = {}, {name: [] for name in tasks}
    try:
        for name, task in tasks.items():  # one after the other: none is disturbed while it warms up
            command = [sys.executable, "-m", "benchmarks.quantizer", "--worker", json.dumps(task, default=str)]
            processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            memory[name] = answer(name, processes[name])
        for _ in range(repeats):
            for name, process in processes.items():
                process.stdin.write("\n")
                process.stdin.flush()
                seconds[name].append(answer(name, process)["seconds"])
            progress.update()
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return {name: memory[name] | {"seconds": statistics.median(seconds[name])} for name in tasks}


def answer(name: str, process) -> dict:
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"The process of '{name}' died; its message stands above.")
    return json.loads(line)


# Sections ------------------------------------------------------------------------------------------------------------


def available_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def row(text: str) -> tuple[int, int, int]:
    """ "tokens,codes,dim" of --rows."""
    tokens, codes, dim = map(int, text.split(","))
    return tokens, codes, dim


def table(args) -> None:
    rows, memory = args.rows or list(map(row, ROWS)), available_memory(args.device)
    lines = [
        "| tokens x codes x dim | | reference s | library s | floor s | ours s | reference / ours | library / ours | "
        "ours / floor | peak MB: reference | library | ours | scratch |",
        "| --- | --- |" + " ---: |" * 11,
    ]
    with tqdm(total=len(rows) * len(MODES) * args.repeats, desc="Table", unit="round", file=sys.stderr) as progress:
        for tokens, codes, dim in rows:
            for mode, description in MODES.items():
                tasks = {
                    method: dict(method=method, mode=mode, tokens=tokens, codes=codes, dim=dim, device=args.device)
                    for method, copies in METHODS.items()
                    if 4 * tokens * codes * copies < 0.8 * memory
                }
                found = side_by_side(tasks, args.repeats, progress)
                time_of = {method: found.get(method, {}).get("seconds") for method in METHODS}
                peak_of = {method: found.get(method, {}).get("peak") for method in METHODS}
                ours, peak = time_of["ours"], peak_of["ours"]
                scratch = None if peak is None else peak - results_in_bytes(mode, tokens, codes, dim) / 1e6
                cells = [f"{tokens:,} x {codes:,} x {dim:,}", description]
                cells += [number(time_of[method]) for method in METHODS]
                for method in ("reference", "library"):
                    cells.append(number(time_of[method] and time_of[method] / ours, ".1f"))
                cells.append(number(ours / time_of["floor"], ".2f"))
                cells += [number(peak_of[method], ",.0f") for method in ("reference", "library", "ours")]
                cells.append(number(scratch, ".0f"))
                lines.append("| " + " | ".join(cells) + " |")
    print("\n".join(lines))
    print(f"\n-: not run, its matrices (4 bytes x tokens x codes, {METHODS['reference']} of them at once for the")
    print(f"reference, {METHODS['library']} for the library) do not fit into the {memory / 1e9:.0f} GB that are free.")


def growth(args) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = {
        "codes": [dict(tokens=2048, codes=2**power, dim=128) for power in range(12, 20)],
        "tokens": [dict(tokens=2**power, codes=65536, dim=128) for power in range(9, 15)],
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
    total = sum(map(len, series.values())) * args.repeats
    with tqdm(total=total, desc="Growth", unit="round", file=sys.stderr) as progress:
        for column, (name, sizes) in enumerate(series.items()):
            found = {"ours": [], "reference": []}
            for size in sizes:
                tasks = {"ours": dict(method="ours", mode="step", device=args.device, **size)}
                if 4 * size["tokens"] * size["codes"] * METHODS["reference"] < 0.5 * available_memory(args.device):
                    tasks["reference"] = tasks["ours"] | {"method": "reference"}
                for method, result in side_by_side(tasks, args.repeats, progress).items():
                    found[method].append((size[name], result["seconds"], result["peak"], size))
            top, bottom = axes[0, column], axes[1, column]
            for method, style in (("reference", "s--"), ("ours", "o-")):
                top.loglog([x for x, *_ in found[method]], [s for _, s, *_ in found[method]], style, label=method)
            (x0, t0, *_), (x1, t1, *_) = found["ours"][-3], found["ours"][-1]
            top.loglog(
                [x for x, *_ in found["ours"]],
                [t1 * x / x1 for x, *_ in found["ours"]],
                ":",
                label="linear",
                color="gray",
            )
            exponent = torch.tensor(t1 / t0).log() / torch.tensor(x1 / x0).log()
            print(f"time grows with the number of {name} to the power of {exponent:.2f} (last three sizes)")
            if found["ours"][0][2] is not None:
                scratch = [
                    (x, max(peak - results_in_bytes("step", *size.values()) / 1e6, 0.1))
                    for x, _, peak, size in found["ours"]
                ]
                print(f"scratch memory over {name}: " + ", ".join(f"{x:,}: {m:.0f} MB" for x, m in scratch))
                bottom.loglog([x for x, _, m, _ in found["reference"]], [m for *_, m, _ in found["reference"]], "s--")
                bottom.loglog([x for x, _ in scratch], [m for _, m in scratch], "o-")
            fixed = "2,048 tokens" if name == "codes" else "65,536 codes"
            top.set(title=f"{fixed} x 128, forward + backward", ylabel="seconds")
            bottom.set(xlabel=name, ylabel="MB (ours: scratch; reference: peak)", ylim=(1, None))
            top.legend()
    write_whole(args.plot, lambda file: figure.savefig(file, dpi=110, format="png"))
    print(f"plot: {args.plot}")


def model(args) -> None:
    from modeling_simvq import VQRAEConfig, VQRAEModel

    so400m = {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16,
        "intermediate_size": 4304, "image_size": 256, "patch_size": 16,
    }  # fmt: skip
    print("Building a SigLIP2-so400m-sized encoder (1.6 GB of random weights).", file=sys.stderr, flush=True)
    config = VQRAEConfig(
        encoder_config=so400m, codebook_size=16384, codebook_dim=1536, decoder_hidden_size=64,
        decoder_num_attention_heads=1, decoder_intermediate_size=64, decoder_num_hidden_layers=1,
    )  # fmt: skip
    tokenizer = VQRAEModel(config).to(args.device).eval()
    pixels = torch.rand(4, 3, 256, 256, device=args.device)
    moments = []
    tokenizer.quantizer.register_forward_pre_hook(lambda *_: moments.append(now(args.device)))
    tokenizer.quantizer.register_forward_hook(lambda *_: moments.append(now(args.device)))
    shares, totals = [], []
    with torch.no_grad():
        for repeat in range(1 + args.repeats):
            moments.clear()
            start = now(args.device)
            tokenizer.encode(pixels)
            total = now(args.device) - start
            if repeat:
                totals.append(total), shares.append((moments[1] - moments[0]) / total)
    print(
        f"encode, 4 images of 256 px, SigLIP2-so400m-sized encoder, 16,384 x 1,536: {statistics.median(totals):.2f} s, "
        f"{statistics.median(shares):.1%} of it in the quantizer"
    )
    codes = 262144
    with tqdm(total=args.repeats, desc="Training step", unit="round", file=sys.stderr) as progress:
        tasks = {"": {"training_step": codes, "device": "cpu"}}
        result = side_by_side(tasks, args.repeats, progress)[""]
    print(
        f"training step of the quick-start model (batch 32, AdamW, CPU) with {codes:,} codes: {result['seconds']:.2f} "
        f"s, {number(result['process'], ',.0f')} MB for the whole process, {number(result['peak'], ',.0f')} MB of them "
        "for the first step"
    )


def tried(args) -> None:
    device = args.device

    def milliseconds(step) -> float:
        step(), step()
        return 1e3 * statistics.median(timed(step, device) for _ in range(4 * args.repeats))

    def tile_minimum(z, codes, half_norms):
        return torch.addmm(half_norms, z, codes.T, alpha=-1).amin(1)

    tokens, dim, codes = 2048, 1536, 4096
    z, codebook = torch.randn(tokens, dim, device=device), torch.randn(codes, dim, device=device)
    low = z.bfloat16(), codebook.bfloat16()
    operations = 2 * tokens * dim * codes / 1e6
    print(
        f"products of {tokens:,} x {dim:,} x {codes:,}: fp32 {operations / milliseconds(lambda: z @ codebook.T):.0f} "
        f"GFLOP/s, bf16 {operations / milliseconds(lambda: low[0] @ low[1].T):.0f} GFLOP/s"
    )
    compiled = torch.compile(tile_minimum)
    for dim in (128, 1536):
        arguments = torch.randn(2048, dim, device=device), torch.randn(512, dim, device=device)
        arguments += (arguments[1].square().sum(1) / 2,)
        print(
            f"a tile of 2,048 x 512 x {dim:,}: {milliseconds(lambda a=arguments: tile_minimum(*a)):.2f} ms, compiled "
            f"{milliseconds(lambda a=arguments: compiled(*a)):.2f} ms"
        )
    dim, block = 1536, 256
    weight, projected = torch.randn(dim, dim, device=device), torch.empty_like(codebook)

    def triangular():  # |W c|^2 = |R c|^2 with W = Q R, by blocks of R's rows, without what is zero
        factor = torch.linalg.qr(weight, mode="r").R.T
        norms = torch.zeros(codes, device=device)
        for first in range(0, dim, block):
            norms += (codebook[:, first:] @ factor[first:, first : first + block]).square().sum(1)

    def plain():
        torch.mm(codebook, weight.T, out=projected).square().sum(1)

    print(
        f"norms of {codes:,} codes of {dim:,} dimensions: projected {milliseconds(plain):.0f} ms, through a triangular "
        f"factor {milliseconds(triangular):.0f} ms, and then the tokens' own product with W: "
        f"{milliseconds(lambda: z @ weight):.0f} ms in fp32, {milliseconds(lambda: z.double() @ weight.double()):.0f} "
        "ms in float64 (fp32 would widen the rounding bound of the search beyond use)"
    )


def kernel(args) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None or not (args.device.type == "cuda" or interpreted):
        print("kernel: not run, it needs --device cuda and Triton.")
        return
    rows, memory = args.rows or list(map(row, KERNEL_ROWS)), available_memory(args.device)
    kernels = [f"kernel {precision}" for precision in PRODUCTS]
    products = {f"kernel {precision}": f"product {arithmetic}" for precision, (arithmetic, _) in PRODUCTS.items()}
    gains = {name: [] for name in kernels}  # how many times as fast as the tiles
    lines = [
        "| tokens x codes x dim | | method | s | s / bare products | library s / s | peak MB | library MB / MB |",
        "| --- | --- | --- |" + " ---: |" * 5,
    ]
    with tqdm(total=len(rows) * 2 * args.repeats, desc="Kernel", unit="round", file=sys.stderr) as progress:
        for tokens, codes, dim in rows:
            for mode in ("eval", "step"):
                methods = ["ours", "ours tf32", *kernels, *(products.values() if mode == "eval" else [])]
                if 4 * tokens * codes * METHODS["library"] < 0.8 * memory:
                    methods.append("library")
                size = dict(mode=mode, tokens=tokens, codes=codes, dim=dim, device=args.device)
                found = side_by_side({name: dict(method=name, **size) for name in methods}, args.repeats, progress)
                library = found.get("library", {"seconds": None, "peak": None})
                for name, result in found.items():
                    bare = found.get(products.get(name), {}).get("seconds")
                    cells = [f"{tokens:,} x {codes:,} x {dim:,}", MODES[mode], name, number(result["seconds"], ".4f")]
                    cells.append(number(bare and result["seconds"] / bare / PRODUCTS[name.split()[1]][1], ".2f"))
                    cells.append(number(library["seconds"] and library["seconds"] / result["seconds"], ".1f"))
                    cells.append(number(result["peak"], ",.0f"))
                    cells.append(number(library["peak"] and library["peak"] / result["peak"], ".1f"))
                    lines.append("| " + " | ".join(cells) + " |")
                for name in kernels:
                    gains[name].append(found["ours"]["seconds"] / found[name]["seconds"])
    print("\n".join(lines))
    best = max(kernels, key=lambda name: min(gains[name]))
    print(f"\n{best}: {min(gains[best]):.2f} to {max(gains[best]):.2f} times as fast as the tiles (ours).")
    if min(gains[best]) > 1.1:
        print("It is worth its code: it enters quantization_simvq.py.")
    else:
        print("The tiles are within a tenth of it somewhere: no kernel, less code wins.")
    print("Aims: at most 1.3 of the bare products (forward), 3 times as fast as the library, a tenth of its memory.")


def main() -> None:
    parser = CommandParser(__doc__)
    sections = {"table": table, "growth": growth, "model": model, "tried": tried, "kernel": kernel}
    parser.add_argument("--sections", nargs="+", default=list(sections), choices=list(sections), help="Default: all.")
    parser.add_argument(
        "--rows", nargs="+", type=row, help="tokens,codes,dim of each row of the sections table and kernel."
    )
    parser.add_argument("--repeats", type=int, default=5, help="Timed steps after the warm-up (default: 5).")
    parser.add_argument("--device", type=present_device, default="cpu", help="cpu (default) or cuda.")
    parser.add_argument(
        "--plot", type=Path, default=Path("runs/quantizer_growth.png"), help="Default: runs/quantizer_growth.png."
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(json.loads(args.worker))
    print(f"torch {torch.__version__}, {name_of(args.device)}, fp32, median of {args.repeats}\n")
    for section in args.sections:
        sections[section](args)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
