"""Clocks, memory, and where the time of a step goes: the same way on a CPU and on a GPU."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity


PRODUCTS = "matrix products", "convolutions", "attention", "the search's kernel"  # what a GPU is fast at
OTHERS = "all other operations", "between operations (Python, launches)"


def now(device: torch.device) -> float:
    """Seconds on the clock, when all that was given to a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that a function takes."""
    start = now(device)
    function()
    return now(device) - start


def peak_megabytes(device: torch.device) -> float:
    """The most memory so far: of a CPU that of the whole process, of a GPU that of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


@dataclass
class Profile:
    """Where the time of something went.

    Args:
        seconds: in all; longer than without the profiler.
        kinds: seconds by `PRODUCTS` and `OTHERS`.
        others: seconds of each operation among the "other" ones, the slowest first.
    """

    seconds: float
    kinds: dict[str, float]
    others: dict[str, float]

    @property
    def outside(self) -> float:
        """The share of the time that is no matrix product, convolution or attention."""
        return sum(self.kinds[kind] for kind in OTHERS) / self.seconds

    def table(self, count: int = 8) -> str:
        """In Markdown, with the slowest of the other operations."""
        lines = ["| part | seconds | share |", "| --- | ---: | ---: |"]
        rows = {**self.kinds, **{f"of the others: {name}": self.others[name] for name in list(self.others)[:count]}}
        lines += [f"| {name} | {seconds:.4f} | {seconds / self.seconds:.1%} |" for name, seconds in rows.items()]
        return "\n".join(lines)


def kind_of(operation: str) -> str:
    """One of `PRODUCTS` and `OTHERS`, by the name that the profiler gives an operation."""
    namespace, _, name = operation.partition("::")
    if namespace == "simvq":
        return "the search's kernel"
    if namespace != "aten":
        return OTHERS[1] if namespace in ("autograd", operation) else OTHERS[0]
    if name in ("mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "mv", "addmv", "dot", "mkldnn_linear"):
        return "matrix products"
    if "attention" in name:
        return "attention"
    return "convolutions" if "conv" in name else OTHERS[0]


def profiled(function: Callable[[], object], device: torch.device) -> Profile:
    """Runs a function once under torch's profiler. On a GPU the time of an operation is that of its kernels, and what
    is between operations is the time in which none ran."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = timed(function, device)
    kinds, others = dict.fromkeys((*PRODUCTS, *OTHERS), 0.0), {}
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:  # a kernel, whose time its operation has
            continue
        own = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        kind = kind_of(event.key)
        if kind == OTHERS[0]:
            others[event.key] = others.get(event.key, 0.0) + own
        if kind != OTHERS[1]:
            kinds[kind] += own
    kinds[OTHERS[1]] = max(0.0, seconds - sum(kinds.values()))
    return Profile(seconds, kinds, dict(sorted(others.items(), key=lambda item: -item[1])))
