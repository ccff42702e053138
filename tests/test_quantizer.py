import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import quantization_simvq
from quantization_simvq import SimVQ, VectorQuantizer


def naive(quantizer, z):
    """Section by section what the SimVQ paper says, on (tokens, dim), with the whole distance matrix."""
    codebook = F.linear(quantizer.embedding.weight, quantizer.embedding_proj.weight, quantizer.embedding_proj.bias)
    distances = z.pow(2).sum(1, keepdim=True) + codebook.pow(2).sum(1) - 2 * z @ codebook.T
    indices = distances.argmin(1)
    z_q = codebook[indices]
    commitment, embedding = (z_q.detach() - z).pow(2).mean(), (z_q - z.detach()).pow(2).mean()
    beta = quantizer.commitment_cost
    loss = commitment + beta * embedding if quantizer.legacy else beta * commitment + embedding
    return z + (z_q - z).detach(), loss, indices


def double_distances(quantizer, z):
    codes = quantizer.get_codebook_entry(torch.arange(quantizer.num_embeddings, device=z.device)).double()
    return (z.double()[:, None] - codes).pow(2).sum(-1)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("layout", ["BCHW", "BNC"])
def test_equals_the_naive_formula_with_gradients(legacy, layout, device):
    torch.manual_seed(0)
    quantizer = SimVQ(96, 24, commitment_cost=0.25, legacy=legacy).to(device)
    z = torch.randn((2, 24, 5, 7) if layout == "BCHW" else (2, 35, 24)).to(device).requires_grad_()
    weights = torch.randn_like(z)

    z_q, loss, indices = quantizer(z)
    (z_q * weights).sum().add(3 * loss).backward()
    ours = [z.grad.clone(), quantizer.embedding_proj.weight.grad.clone(), quantizer.embedding_proj.bias.grad.clone()]

    z.grad = quantizer.embedding_proj.weight.grad = quantizer.embedding_proj.bias.grad = None
    flat = (z.permute(0, 2, 3, 1) if layout == "BCHW" else z).reshape(-1, 24)
    naive_z_q, naive_loss, naive_indices = naive(quantizer, flat)
    if layout == "BCHW":
        naive_z_q = naive_z_q.view(2, 5, 7, 24).permute(0, 3, 1, 2)
    naive_z_q = naive_z_q.reshape(z.shape)
    (naive_z_q * weights).sum().add(3 * naive_loss).backward()
    theirs = [z.grad, quantizer.embedding_proj.weight.grad, quantizer.embedding_proj.bias.grad]

    assert indices.shape == ((2, 5, 7) if layout == "BCHW" else (2, 35)) and indices.dtype == torch.int64
    assert torch.equal(indices.flatten(), naive_indices)
    torch.testing.assert_close(z_q, naive_z_q, atol=1e-6, rtol=0)
    torch.testing.assert_close(loss, naive_loss, atol=1e-6, rtol=0)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert not quantizer.embedding.weight.requires_grad and quantizer.embedding.weight.grad is None


def test_same_indices_and_loss_as_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    theirs = library.SimVQ(dim=16, codebook_size=200, rotation_trick=False)
    ours = SimVQ(200, 16, legacy=False)
    with torch.no_grad():
        ours.embedding.weight.copy_(theirs.frozen_codebook)
        ours.embedding_proj.weight.copy_(theirs.code_transform.weight)
        ours.embedding_proj.bias.zero_()
    z = torch.randn(3, 50, 16)
    quantized, indices, loss = theirs(z)
    z_q, vq_loss, ours_indices = ours(z)
    assert torch.equal(indices, ours_indices)
    torch.testing.assert_close(z_q, quantized, atol=1e-5, rtol=0)
    torch.testing.assert_close(vq_loss, loss, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_embeddings", [8, 1030])
def test_ties_go_to_the_lowest_index(num_embeddings, device):
    torch.manual_seed(0)
    quantizer, z = SimVQ(num_embeddings, 20).to(device), torch.randn(1, 300, 20).to(device)
    half = num_embeddings // 2
    quantizer.embedding.weight[half:].copy_(quantizer.embedding.weight[: num_embeddings - half])
    indices = quantizer(z)[2]
    assert indices.max() < half
    nn.init.zeros_(quantizer.embedding_proj.weight)  # every code is b
    assert quantizer(z)[2].eq(0).all()


@pytest.mark.parametrize("offset", [0.0, 10.0, 30.0])
@pytest.mark.parametrize("shift_codes", [False, True])
def test_search_is_that_of_float64(offset, shift_codes, device):
    torch.manual_seed(0)
    quantizer = SimVQ(1500, 32).to(device)
    direction = F.normalize(torch.randn(32), dim=0).to(device)
    if shift_codes:
        quantizer.embedding_proj.bias.data += offset * direction
    z = torch.randn(400, 32).to(device) / 32**0.5 + offset * direction
    indices = quantizer(z[None])[2][0]
    distances = double_distances(quantizer, z)
    chosen = distances.gather(1, indices[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.amin(1), rtol=1e-6, atol=1e-12)
    if not shift_codes:  # a shifted code has rounding of its own
        assert torch.equal(indices, distances.argmin(1))


def test_near_ties_that_fp32_gets_wrong_are_decided_in_float64(device):
    """Pairs of codes closer than fp32 scores can tell, on a dyadic grid of mean 0, where centring is exact."""
    torch.manual_seed(0)
    codes = torch.randint(-(2**13), 2**13, (64, 256)).to(device) / 2**10
    twins = codes.clone()
    twins[:, 7] += 2**-10
    quantizer = VectorQuantizer(256, 256).to(device)
    quantizer.embedding.weight.data = torch.cat([codes, twins, -codes, -twins])
    z = codes.repeat(4, 1) + 0.01 * torch.randn(256, 256).to(device)
    distances = (z.double()[:, None] - quantizer.embedding.weight.double()).pow(2).sum(-1)
    plain = (quantizer.embedding.weight.pow(2).sum(1) - 2 * z @ quantizer.embedding.weight.T).argmin(1)
    assert (plain != distances.argmin(1)).sum() > 20
    assert torch.equal(quantizer(z[None])[2][0], distances.argmin(1))


def test_codes_that_are_exactly_as_near_are_decided_by_their_order_where_float64_rounds(device):
    """z + d and z - d, of so many bits and dimensions that their float64 scores differ by rounding."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        z, d = (torch.randint(-(2**22), 2**22, (4096,), generator=generator).to(device) / 2**24 for _ in range(2))
        pair = torch.stack([z + d, z - d])
        quantizer = VectorQuantizer(4, 4096).to(device)
        for codes in (pair, pair.flip(0)):
            quantizer.embedding.weight.data = torch.cat([codes, -codes])  # of mean 0, so that centring is exact
            assert quantizer(z[None, None])[2].item() == 0


def test_a_huge_code_does_not_make_others_equally_near():
    """What float64 rounds of the distance to it is more than the difference of two others."""
    near = torch.tensor([[0.0, 1.0], [0.0, 1 + 2**-10]])
    huge = torch.tensor([[2.0**15, 0.0]])
    quantizer = VectorQuantizer(6, 2)
    quantizer.embedding.weight.data = torch.cat([near, -near, huge, -huge])
    assert quantizer(near[None])[2].tolist() == [[0, 1]]


def test_tiling_does_not_change_the_result(monkeypatch):
    torch.manual_seed(0)
    quantizer, z = SimVQ(301, 16), torch.randn(1, 157, 16)
    expected = quantizer(z)[2]
    monkeypatch.setattr(quantization_simvq, "_TILE_TOKENS", 10)
    monkeypatch.setattr(quantization_simvq, "_TILE_SCORES", {"cpu": 70})
    assert torch.equal(quantizer(z)[2], expected)


def test_search_runs_in_fp32_under_autocast(device):
    torch.manual_seed(0)
    quantizer, z = SimVQ(4096, 32).to(device), torch.randn(1, 500, 32).to(device) + 5
    expected = quantizer(z)
    with torch.autocast(device.type, torch.bfloat16):
        z_q, loss, indices = quantizer(z)
    assert torch.equal(indices, expected[2]) and torch.equal(z_q, expected[0]) and loss.dtype == torch.float32


class RoundsAsAllowed(TorchDispatchMode):
    """A CPU with units for bf16, to which it rounds the operands of fp32 products where that is allowed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        products = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
        if func in products and torch.backends.mkldnn.matmul.fp32_precision == "bf16":
            args = [x.bfloat16().float() if x.ndim == 2 else x for x in args]
        return func(*args, **(kwargs or {}))


def test_codes_are_projected_in_fp32_whatever_products_may_be_rounded_to():
    """TF32 or bf16 is a setting of the process; other codes are other tokens than those of the same model elsewhere."""
    torch.manual_seed(0)
    quantizer, z = SimVQ(4096, 32).eval(), torch.randn(1, 500, 32)
    expected = quantizer(z)
    torch.set_float32_matmul_precision("medium")
    try:
        with RoundsAsAllowed():
            z_q, _, indices = copy.deepcopy(quantizer)(z)  # which has no table yet
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # as it was
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(indices, expected[2]) and torch.equal(z_q, expected[0])


def test_entries_are_projected_codes():
    quantizer = SimVQ(50, 8)
    z_q, _, indices = quantizer(torch.randn(2, 9, 8))
    assert torch.equal(quantizer.get_codebook_entry(indices), z_q)
    assert not torch.allclose(quantizer.embedding.weight[indices], z_q, atol=1e-2)


def test_state_dict_has_the_names_of_the_reference_and_nothing_else():
    quantizer = SimVQ(50, 8).eval()
    quantizer(torch.randn(2, 9, 8))
    assert set(quantizer.state_dict()) == {"embedding.weight", "embedding_proj.weight", "embedding_proj.bias"}


def test_no_optimizer_moves_the_codebook():
    quantizer = SimVQ(50, 8)
    before = copy.deepcopy(quantizer.state_dict())
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        quantizer(torch.randn(2, 9, 8))[1].backward()
        optimizer.step()
    assert torch.equal(before["embedding.weight"], quantizer.embedding.weight)
    assert not torch.equal(before["embedding_proj.weight"], quantizer.embedding_proj.weight)
    assert not torch.equal(before["embedding_proj.bias"], quantizer.embedding_proj.bias)


def optimizer_step(quantizer):
    quantizer(torch.randn(1, 40, 8))[1].backward()
    torch.optim.SGD(quantizer.parameters(), lr=5.0).step()
    return quantizer


def load_other(quantizer):
    quantizer.load_state_dict(SimVQ(50, 8).state_dict())
    return quantizer


def edit_data(quantizer):
    quantizer.embedding_proj.weight.data.mul_(-1)
    return quantizer


def fit(quantizer):
    quantizer.fit(torch.randn(100, 8))
    return quantizer


def other_codes(quantizer):
    """The codebook alone; the projection is as it was."""
    quantizer.embedding.weight.mul_(-1)
    return quantizer


@pytest.mark.parametrize(
    "change",
    [optimizer_step, load_other, edit_data, other_codes, fit, lambda q: q.to(torch.bfloat16), lambda q: q.double()],
)
def test_cached_codes_never_outlive_their_parameters(change):
    torch.manual_seed(0)
    quantizer, z = SimVQ(50, 8).eval(), torch.randn(1, 200, 8)
    quantizer(z)
    changed = change(quantizer)
    fresh = copy.deepcopy(changed)  # a copy has no cache
    assert fresh._cache is None
    assert torch.equal(changed(z)[2], fresh(z)[2])


def test_cache_is_reused_in_eval_and_absent_in_training_and_pickles():
    quantizer, z = SimVQ(50, 8).eval(), torch.randn(1, 20, 8)
    quantizer(z)
    table = quantizer._cache
    quantizer(z)
    assert quantizer._cache is table
    assert pickle.loads(pickle.dumps(quantizer))._cache is None
    quantizer.train()(z)
    assert quantizer._cache is None


def test_usage_is_the_share_of_codes_seen_since_the_reset():
    torch.manual_seed(0)
    quantizer = SimVQ(50, 8)
    assert quantizer.get_codebook_usage() == 0
    first, second = (quantizer(torch.randn(1, 20, 8))[2] for _ in range(2))
    both = torch.cat([first, second]).flatten()
    assert quantizer.get_codebook_usage() == len(set(both.tolist())) / 50
    assert torch.equal(quantizer.get_codebook_counts(), torch.bincount(both, minlength=50))
    assert copy.deepcopy(quantizer).get_codebook_usage() == 0
    quantizer.reset_codebook_usage()
    assert quantizer.get_codebook_usage() == 0


@pytest.mark.parametrize(
    "z, message",
    [
        (torch.randn(2, 9, 7), "7.*8"),
        (torch.randn(2, 7, 3, 3), "7.*8"),
        (torch.randn(9, 8), r"\(9, 8\)"),
        (torch.zeros(2, 9, 8, dtype=torch.int64), "int64"),
    ],
)
def test_bad_latents_are_named(z, message):
    with pytest.raises(ValueError, match=message):
        SimVQ(50, 8).eval()(z)


@pytest.mark.parametrize("training", [True, False])
def test_nonfinite_latents_are_counted(training, monkeypatch):
    said = []
    monkeypatch.setattr(quantization_simvq.logger, "warning_once", said.append)
    quantizer, z = SimVQ(50, 8).train(training), torch.randn(1, 5, 8)
    z[0, 1, 3], z[0, 4, 0] = float("nan"), float("inf")
    indices = quantizer(z)[2]
    assert quantizer.get_num_nonfinite() == 2 and 0 <= indices.min() and indices.max() < 50
    assert ["2 of 5 latents" in text for text in said] == [True] * (not training)  # a trainer says it itself


def test_codes_of_equal_norm_in_doubt_are_not_copied_all_at_once(monkeypatch):
    """Every code is a candidate for every token where all codes are the same: float64 takes them in parts, too."""
    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                largest.append(result.numel())
            return result

    monkeypatch.setattr(quantization_simvq, "_TILE_SCORES", {"cpu": 2**16})
    codes, z = torch.ones(4096, 64), torch.randn(2, 64)
    with Largest():
        indices = quantization_simvq.nearest_codes(z, codes, codes.square().sum(1) / 2, torch.zeros(64))
    assert (indices == 0).all() and max(largest) <= 2**16


def test_same_codes_on_every_process():
    """Nothing trains them, so nothing would ever make processes agree that drew them from seeds of their own."""
    torch.manual_seed(1)
    first = SimVQ(50, 8)
    torch.manual_seed(2)
    second = SimVQ(50, 8)
    assert torch.equal(first.embedding.weight, second.embedding.weight)
    assert not torch.equal(first.embedding_proj.weight, second.embedding_proj.weight)


@pytest.mark.parametrize("indices", [torch.tensor([50]), torch.tensor([-1]), torch.tensor([0.0])])
def test_indices_outside_the_codebook_are_refused(indices):
    with pytest.raises(ValueError, match="Code indices"):
        SimVQ(50, 8).get_codebook_entry(indices)


def test_empty_codebook_is_refused():
    with pytest.raises(ValueError, match="num_embeddings"):
        SimVQ(0, 8)


def test_index_of_the_fp32_formula_wherever_rounding_does_not_decide():
    """... and where it does, a code that is at least as near in float64."""
    torch.manual_seed(0)
    quantizer, z = SimVQ(5000, 48), torch.randn(3000, 48)
    ours, theirs = quantizer(z[None])[2][0], naive(quantizer, z)[2]
    rows = (ours != theirs).nonzero().squeeze(1)
    assert len(rows) < 5
    distances = double_distances(quantizer, z[rows])
    assert (distances.gather(1, ours[rows, None]) <= distances.gather(1, theirs[rows, None]) * (1 + 1e-7)).all()


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and "view" not in str(func) and func is not torch.ops.aten.t.default:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("codes, tokens", [(3000, 200), (12000, 200), (3000, 2000)])
def test_memory_of_the_search_grows_neither_with_codes_nor_with_tokens(monkeypatch, codes, tokens):
    monkeypatch.setattr(quantization_simvq, "_TILE_TOKENS", 100)
    monkeypatch.setattr(quantization_simvq, "_TILE_SCORES", {"cpu": 2500})
    quantizer, z = SimVQ(codes, 8).eval(), torch.randn(tokens, 8)
    table = quantizer._search_table()
    with LargestResult() as largest:
        quantization_simvq.nearest_codes(z, *table)
    assert largest.elements <= 2500


def test_nothing_of_the_codebooks_size_is_kept_for_the_backward_pass():
    quantizer, z = SimVQ(3000, 8), torch.randn(1, 50, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        z_q, loss, _ = quantizer(z)
    assert max(saved) <= 50 * 8
    (z_q.sum() + loss).backward()
    assert quantizer.embedding_proj.weight.grad.abs().sum() > 0


def test_entries_project_the_chosen_rows_alone():
    quantizer = SimVQ(3000, 8)
    with LargestResult() as largest:
        quantizer.get_codebook_entry(torch.tensor([[5, 2999]]))
    assert largest.elements <= 2 * 8
