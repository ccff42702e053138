"""Tokens on a GPU: those of float64 whatever products are allowed to round, and those of a CPU.

`python -m pytest -m cuda` runs these and what is marked elsewhere: training that is killed and goes on, and that of two
processes (`tests/test_survival.py`), evaluations that are interrupted (`tests/test_evaluation_resumed.py`), graphs of
`torch.compile` (`tests/test_inference.py`), formulas (`tests/test_quantizer.py`)."""

import functools

import pytest
import torch
from PIL import Image
from test_loading import ROOT

from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from quantization_simvq import SimVQ, VectorQuantizer, nearest_codes
from reading.models import exact_float32


GPU = torch.device("cuda")


# Adversarial latents --------------------------------------------------------------------------------------------------


def codes_of(kind: str) -> torch.Tensor:
    """Codes (N, 64) of few bits, so that centring them, and latents near them, rounds nothing: whatever differs from
    float64 is the fault of the search."""
    torch.manual_seed(0)
    codes = torch.randint(-(2**13), 2**13, (64, 64)) / 2**10
    codes[:, 0] = 0
    twins = codes.clone()
    twins[:, 7] += 2**-10  # a score of fp32 does not tell them apart
    codes = torch.cat([codes, twins, -codes, -twins])
    if kind == "large offset":
        codes = codes + 2**11
    elif kind == "huge norms":
        codes = codes * 2**12
    elif kind == "one huge code":  # its rounding error is that of all scores
        huge = torch.zeros(2, 64)
        huge[:, 0] = torch.tensor([2.0**15, -(2.0**15)])
        codes = torch.cat([codes, huge])
    elif kind == "equal codes":
        codes = torch.cat([codes, codes])
    return codes


@functools.cache
def adversarial(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, latents (N, 64) of a dtype, and the tokens (N,) of float64, computed by the definition."""
    codes = codes_of(kind)
    spread = 2**12 if kind == "huge norms" else 1
    z = (codes + spread * 0.01 * torch.randn(codes.shape)).to(dtype)
    distances = (z.double()[:, None] - codes.double()).square().sum(-1)
    nearest = (distances == distances.amin(1, keepdim=True)).int().argmax(1)  # the lowest of those that are
    return codes, z, nearest


KINDS = ["near ties", "large offset", "huge norms", "one huge code", "equal codes"]


@pytest.fixture(params=["highest", "high", "medium", "allow_tf32", "autocast"])
def products(request, device):
    """What fp32 products may be rounded to: TF32 on a GPU from "high" on, bf16 on CPUs that have it at "medium"."""
    if request.param == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif request.param != "autocast":
        torch.set_float32_matmul_precision(request.param)
    with torch.autocast(device.type, torch.bfloat16, enabled=request.param == "autocast"):
        yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_float64(kind, dtype, products, device):
    codes, z, expected = adversarial(kind, dtype)
    quantizer = VectorQuantizer(*codes.shape).to(device)
    quantizer.embedding.weight.data = codes.to(device)
    assert torch.equal(quantizer(z[None].to(device))[2][0].cpu(), expected)


def test_fp32_alone_would_not_do():
    """... on the CPU, and less so in TF32: else the test above would show nothing."""
    for kind in KINDS:
        codes, z, expected = adversarial(kind, torch.float32)
        in_fp32 = (codes.square().sum(1) - 2 * z @ codes.T).argmin(1)
        assert (in_fp32 != expected).sum() > 5, kind


# The same tokens as on a CPU ------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_no_token_of_equal_latents_differs_from_the_cpu_s(kind):
    codes, z, _ = adversarial(kind, torch.float32)
    mean = codes.mean(0)
    table = codes - mean, (codes - mean).square().sum(1) / 2, mean
    assert torch.equal(nearest_codes(*(x.to(GPU) for x in (z, *table))).cpu(), nearest_codes(z, *table))


@pytest.mark.cuda
def test_no_token_of_a_projected_codebook_differs_from_the_cpu_s():
    """W c + b is rounded in another order there: 1e-7 of a code, where two codes are 1e-3 apart as seen from a latent
    in the mean, so one of about 10,000 latents could differ. None of these does."""
    torch.manual_seed(0)
    quantizer, z = SimVQ(4096, 32).eval(), torch.randn(1, 2000, 32)
    expected = quantizer(z)
    found = quantizer.to(GPU)(z.to(GPU))
    assert torch.equal(found[2].cpu(), expected[2])
    torch.testing.assert_close(found[0].cpu(), expected[0])
    torch.testing.assert_close(found[1].cpu(), expected[1])


@pytest.fixture
def photographs():
    """The tokenizer in the box, pixels (2, 3, 224, 224), and what it makes of them on the CPU."""
    exact_float32()
    checkpoint = ROOT / "checkpoints" / "vqrae-dinov2-small"
    model, processor = VQRAEModel.from_pretrained(checkpoint).eval(), VQRAEImageProcessor.from_pretrained(checkpoint)
    files = [ROOT / "examples" / "images" / name for name in ("astronaut.jpg", "coffee.jpg")]
    pixels = processor([Image.open(file) for file in files], return_tensors="pt").pixel_values
    with torch.no_grad():
        latents = model.get_latents(pixels)
        return model, pixels, latents, model.quantizer(latents)[2]


@pytest.mark.cuda
def test_few_tokens_of_photographs_differ_from_the_cpu_s_and_none_of_equal_latents(photographs, capsys):
    """The encoder's sums are rounded in another order; a latent that lies between two codes may go to the other one."""
    model, pixels, latents, expected = photographs
    model.to(GPU)
    with torch.no_grad():
        found, of_equal_latents = model.get_image_tokens(pixels.to(GPU)), model.quantizer(latents.to(GPU))[2]
    assert torch.equal(of_equal_latents.cpu(), expected)
    different = found.cpu().flatten(1) != expected
    with capsys.disabled():
        print(f"\n{different.sum()} of {different.numel():,} tokens of photographs differ between GPU and CPU")
    # float32 puts the latents of the CPU 8e-7 of their length beside those of float64: not one token of 784 moved
    assert different.float().mean() < 0.005


# CUDA graphs ----------------------------------------------------------------------------------------------------------


def test_the_search_says_that_no_cuda_graph_holds_it():
    """How many latents fp32 leaves undecided, and so the shapes of what float64 decides, is known on the CPU only after
    the GPU has counted them, and a graph cannot wait for a number. `torch.compile` puts what comes before the search
    and what comes after it into graphs where it is told so; else it would fail while it records one."""
    assert torch.Tag.cudagraph_unsafe in torch.ops.simvq.nearest_codes.default.tags


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_between_cuda_graphs_are_those_of_float64(kind):
    torch._dynamo.reset()
    codes, z, expected = adversarial(kind, torch.float32)
    quantizer = VectorQuantizer(*codes.shape).to(GPU).eval()
    quantizer.embedding.weight.data = codes.to(GPU)
    compiled = torch.compile(quantizer, mode="reduce-overhead")
    for order in (torch.arange(len(z)), *(torch.randperm(len(z)) for _ in range(3))):  # recorded, and then replayed
        with torch.no_grad():
            tokens = compiled(z[order][None].to(GPU))[2][0].cpu()
        assert torch.equal(tokens, expected[order])
    assert quantizer.get_codebook_counts().sum() == 4 * len(z)
