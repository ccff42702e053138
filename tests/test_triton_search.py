"""The candidate kernel of the search. `TestKernel` runs under Triton's interpreter, in a process of its own since the
interpreter changes Triton for all that use it, and on a GPU (marked `cuda`)."""

import argparse
import contextlib
import functools
import os
import subprocess
import sys

import pytest
import torch

import quantization_simvq


triton = pytest.importorskip("triton", reason="Triton comes with torch's builds for CUDA")

from benchmarks import quantizer, triton_search  # noqa: E402


DEVICE = "cpu" if triton_search.INTERPRETED else "cuda"
PRECISIONS = list(triton_search.BLOCKS)


def on_this_device(tests):
    if triton_search.INTERPRETED:
        return tests
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(tests))


in_the_main_process = pytest.mark.skipif(triton_search.INTERPRETED, reason="is for Triton's compiler")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_a_grid(*shape, limit=2**13):
    """Numbers of few bits, whose differences fp32 has without rounding."""
    return torch.randint(-limit, limit, shape, generator=torch.Generator().manual_seed(0)) / 2**10


def arguments(latents, codes, mean):
    return [x.to(DEVICE) for x in (latents, codes - mean, (codes - mean).square().sum(1) / 2, mean)]


def search(latents, codes, precision, mean=None):
    mean = torch.zeros(codes.shape[1]) if mean is None else mean
    return triton_search.nearest_codes(*arguments(latents, codes, mean), precision).cpu()


def brute_force(latents, codes):
    """The lowest index among those of the smallest distance in float64."""
    distances = (latents.double()[:, None] - codes.double()).square().sum(2)
    return (distances == distances.amin(1, keepdim=True)).int().argmax(1)


def two_lowest(latents, codes, precision):
    z, codes, half_norms, _ = arguments(latents, codes, torch.zeros(codes.shape[1]))
    return [x.cpu() for x in triton_search.two_lowest_scores(z, codes, half_norms, precision)]


def twins():
    """Latents, and pairs of codes near them that differ by less than the scores are exact to."""
    codes = on_a_grid(20, 24)
    others = codes.clone()
    others[:, 7] += 2**-10
    return (codes + 0.01 * random(20, 24)).repeat(2, 1), torch.cat([codes, others])


@on_this_device
@pytest.mark.parametrize("precision", PRECISIONS)
class TestKernel:
    @pytest.fixture(autouse=True)
    def one_choice_of_blocks(self, precision, monkeypatch):
        """The smallest; a GPU would compile and time all of them for each size."""
        blocks = (16, 16, 16, 4, 1) if triton_search.INTERPRETED else triton_search.BLOCKS[precision][-1]
        monkeypatch.setitem(triton_search.KERNELS, precision, triton_search.fastest_kernel([blocks]))

    def test_every_choice_of_blocks(self, precision, monkeypatch):
        latents, codes = random(20, 40), random(140, 40, seed=1)
        expected = brute_force(latents, codes)
        for blocks in triton_search.BLOCKS[precision]:
            monkeypatch.setitem(triton_search.KERNELS, precision, triton_search.fastest_kernel([blocks]))
            with contextlib.suppress(triton.runtime.errors.OutOfResources):  # some are for large GPUs alone
                assert torch.equal(search(latents, codes, precision), expected)

    @pytest.mark.parametrize("tokens, codes, dim", [(37, 70, 24), (1, 1, 8), (16, 33, 7), (3, 40, 130)])
    def test_indices_are_those_of_float64_whatever_the_sizes(self, precision, tokens, codes, dim):
        latents, entries = random(tokens, dim), random(codes, dim, seed=1)
        assert torch.equal(search(latents, entries, precision), brute_force(latents, entries))

    @pytest.mark.parametrize("least_codes", [20, 1024])
    def test_both_scores_are_within_the_bound(self, precision, least_codes, monkeypatch):
        """In one part, and merged from several."""
        monkeypatch.setattr(triton_search, "_LEAST_CODES", least_codes)
        monkeypatch.setattr(triton_search, "_PARTED_TOKENS", 2**30)
        z, codes = random(20, 24), random(50, 24, seed=1)
        index, *scores = two_lowest(z, codes, precision)
        half_norms = codes.double().square().sum(1) / 2
        exact = (half_norms - z.double() @ codes.double().T).topk(2, largest=False)
        error = triton_search.relative_error(24, precision, torch.device(DEVICE))
        bound = error * (half_norms.max() + z.double().norm(dim=1) * (2 * half_norms.max()).sqrt())
        for found, expected in zip(scores, exact.values.T):
            assert ((found - expected).abs() <= bound).all()
        clear = exact.values[:, 1] - exact.values[:, 0] > 2 * bound
        assert clear.sum() > 15 and torch.equal(index[clear], exact.indices[clear, 0])

    def test_near_ties_that_its_products_get_wrong_are_decided_in_float64(self, precision):
        latents, codes = twins()
        expected = brute_force(latents, codes)
        assert (two_lowest(latents, codes, precision)[0] != expected).any()
        assert torch.equal(search(latents, codes, precision), expected)

    def test_of_equal_codes_the_lowest_index(self, precision, monkeypatch):
        """In a block, in two blocks of a part, and in two parts."""
        monkeypatch.setattr(triton_search, "_LEAST_CODES", 40)
        monkeypatch.setattr(triton_search, "_PARTED_TOKENS", 2**30)
        codes, latents = random(9, 24).repeat(7, 1), random(17, 24, seed=1)
        expected = brute_force(latents, codes)
        index, best, runner_up = two_lowest(latents, codes, precision)
        assert expected.max() < 9 and torch.equal(index, expected) and torch.equal(best, runner_up)
        assert torch.equal(search(latents, codes, precision), expected)

    def test_a_large_offset_is_taken_away_before_products_round(self, precision):
        mean = on_a_grid(24) + 1000
        latents, codes = on_a_grid(20, 24, limit=2**8) + mean, on_a_grid(40, 24, limit=2**7) + mean
        assert torch.equal(search(latents, codes, precision, mean), brute_force(latents, codes))

    def test_huge_norms(self, precision):
        """All of them, and one code among small ones, which makes every token doubtful."""
        latents, codes = random(20, 24), random(40, 24, seed=1)
        assert torch.equal(search(latents * 1e15, codes * 1e15, precision), brute_force(latents, codes))
        codes[11] *= 1e6
        assert torch.equal(search(latents, codes, precision), brute_force(latents, codes))

    def test_a_token_with_nan_gets_code_0_and_does_not_touch_others(self, precision):
        latents, codes = random(20, 24), random(40, 24, seed=1)
        expected = brute_force(latents, codes)
        latents[4, 3], latents[9, 0] = float("nan"), float("inf")
        found = search(latents, codes, precision)
        assert found[4] == 0 and 0 <= found[9] < 40
        others = latents.isfinite().all(1)
        assert torch.equal(found[others], expected[others])

    def test_latents_and_codes_whose_rows_are_not_contiguous(self, precision):
        latents, codes = random(24, 20).T, random(24, 40, seed=1).T
        assert torch.equal(search(latents, codes, precision), brute_force(latents, codes))

    def test_more_tokens_than_are_searched_at_a_time(self, precision, monkeypatch):
        latents, codes = random(37, 24), random(20, 24, seed=1)
        monkeypatch.setattr(triton_search, "_TOKENS", 16)
        assert torch.equal(search(latents, codes, precision), brute_force(latents, codes))

    def test_the_benchmark_s_step_is_that_of_our_tiles(self, precision, monkeypatch):
        monkeypatch.setattr(quantization_simvq, "nearest_codes", quantization_simvq.nearest_codes)  # put back
        size = "eval", 20, 40, 8, torch.device(DEVICE)
        expected = quantizer.quantizer_step("ours", *size)()
        calls = []
        monkeypatch.setattr(triton_search, "nearest_codes", count(triton_search.nearest_codes, calls))
        found = quantizer.quantizer_step(f"kernel {precision}", *size)()
        assert calls == [precision] and all(map(torch.equal, found, expected))


def count(function, calls: list):
    @functools.wraps(function)
    def counted(*args, precision):
        calls.append(precision)
        return function(*args, precision=precision)

    return counted


@in_the_main_process
def test_the_kernel_is_right_under_the_interpreter(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-o", "addopts=", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [*command, f"{__file__}::TestKernel"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{15 * len(PRECISIONS)} passed" in done.stdout and "skipped" not in done.stdout


@in_the_main_process
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_compiles_for_a_gpu_that_is_not_here(precision, tmp_path, monkeypatch):
    """For an H100, whose programs have at most 232,448 bytes of shared memory, without registers that spill."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    registers, spilled, shared = triton_search.compiled(90, 40, precision, triton_search.BLOCKS[precision][-1])
    assert 0 < registers <= 255 and spilled == 0 and 0 < shared <= 232_448


@pytest.mark.parametrize("precision, unit", [("tf32x3", 2**-10), ("bf16x3", 2**-8)])
def test_numbers_are_split_as_the_bound_says(precision, unit):
    x = random(1000) * 2.0 ** torch.arange(-20, 20).repeat(25)
    high, low = triton_search.split(x, precision)
    assert ((x - high).abs() <= unit * x.abs()).all()
    assert ((x.double() - high.double() - low.double()).abs() <= unit**2 * x.abs()).all()
    bits = (high if precision == "tf32x3" else high.float()).view(torch.int32)
    assert (bits & (2**13 - 1 if precision == "tf32x3" else 2**16 - 1) == 0).all()


@in_the_main_process
@pytest.mark.parametrize("seconds, verdict", [(0.95, "less code wins"), (0.8, "it enters quantization_simvq.py")])
def test_the_benchmark_says_whether_the_kernel_is_worth_its_code(seconds, verdict, monkeypatch, capsys):
    """Where one of two sizes is not faster by a tenth, it is not."""

    def timed(tasks, repeats, progress):
        small = all(task["codes"] == 64 for task in tasks.values())
        times = {"ours": 1.0, "kernel bf16x3": seconds if small else 0.5, "product bf16": 0.25, "library": 3.0}
        return {name: {"seconds": times.get(name, 2.0), "peak": 30.0} for name in tasks}

    monkeypatch.setattr(quantizer, "side_by_side", timed)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    quantizer.kernel(argparse.Namespace(device=torch.device("cpu"), rows=[(8, 64, 8), (8, 128, 8)], repeats=1))
    said = capsys.readouterr().out
    assert verdict in said and f"kernel bf16x3: {1 / seconds:.2f} to 2.00 times as fast" in said
    assert "| 8 x 128 x 8 | forward, eval | kernel bf16x3 | 0.5000 | 0.67 | 6.0 | 30 | 1.0 |" in said
