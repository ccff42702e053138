"""Fused latents and the decoder's linear path, against numpy and scikit-learn on small features."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_config
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from test_loading import ROOT, run

import modeling_simvq
from configuration_simvq import VQRAEConfig
from fitting_simvq import RIDGE, Moments, fuse
from modeling_simvq import VQRAEModel


pytestmark = pytest.mark.timeout(300)
FUSED = {"encoder_layers": [0, 1, 2], "pixel_weight": 2.0, "codebook_dim": 12, "codebook_size": 40}


def fused_model(**fields) -> VQRAEModel:
    torch.manual_seed(0)
    return VQRAEModel(tiny_config(**{**FUSED, "decoder_linear_path": 3, **fields})).eval()


def smooth_images(count: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    """Images whose neighbours are alike, (count, 3, size, size) in [0, 1]."""
    noise = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=size, mode="bilinear")


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return -10 * (one - other).square().mean().log10().item()


@pytest.fixture(scope="module")
def images():
    return smooth_images(48)


@pytest.fixture(scope="module")
def fitted(images):
    model = fused_model()
    model.initialize_codebook(images.split(16))
    return model


@torch.no_grad()
def listed_layers(model, images) -> np.ndarray:
    """The normalised layers side by side, as `project_in` takes them: float64, (tokens, layers * width)."""
    return model._checked_features(images)[1].flatten(0, 1).double().numpy()


def patches_of(images) -> np.ndarray:
    """Normalised (mean and standard deviation 0.5) patches of 8 px, channels last: (tokens, 192)."""
    pixels = (images.double().numpy() - 0.5) / 0.5
    pixels = pixels.reshape(len(pixels), 3, 4, 8, 4, 8)
    return pixels.transpose(0, 2, 4, 3, 5, 1).reshape(-1, 192)


# The fit -------------------------------------------------------------------------------------------------------------


def test_projections_are_ridge_regression_and_principal_components(fitted, images):
    layers, pixels = listed_layers(fitted, images), patches_of(images)
    shallow, last = layers[:, :64], layers[:, 64:]
    alpha = RIDGE * shallow.var(0).mean() * len(shallow)
    predicted = Ridge(alpha=alpha).fit(shallow, pixels).predict(shallow)
    scale = 2.0 * np.sqrt(last.var(0).sum() / predicted.var(0).sum())
    fused = np.concatenate([last, scale * predicted], axis=1)
    pca = PCA(12).fit(fused)
    expected = pca.transform(fused)
    with torch.no_grad():
        latents = fitted.get_latents(images).flatten(0, 1).double().numpy()
        back = fitted.project_out(torch.from_numpy(latents).float()).double().numpy()
    signs = np.sign((latents * expected).sum(0))
    np.testing.assert_allclose(latents, expected * signs, atol=2e-4)
    # least squares from the latents back to the layer and the predicted pixels
    targets = np.concatenate([last, predicted], axis=1)
    inputs = np.concatenate([expected, np.ones((len(expected), 1))], axis=1)
    solution = np.linalg.lstsq(inputs, targets, rcond=None)[0]
    np.testing.assert_allclose(back, inputs @ solution, atol=1e-3)
    report = fitted.config.latents_fit
    assert report["images"] == 48 and report["tokens"] == 48 * 16
    assert report["variance_kept"] == pytest.approx(pca.explained_variance_ratio_.sum(), abs=1e-5)
    error = np.square((predicted - pixels) * 0.5).mean()  # of pixels in [0, 1]
    assert report["pixels_psnr"] == pytest.approx(-10 * np.log10(error), abs=0.01)


def test_pixels_are_weighted_by_their_total_variance(images):
    """`pixel_weight` is the ratio of the standard deviations of what is fused."""
    shares = []
    for weight in (0.5, 1, 4):
        model = fused_model(pixel_weight=weight, codebook_dim=200)
        model.initialize_codebook(images.split(16))
        with torch.no_grad():
            latents = model.get_latents(images).flatten(0, 1)
        back = model.project_out.weight
        meaning = (latents @ back[:32].T).var(0).sum()
        shares.append((latents.var(0).sum() - meaning) / meaning)
    torch.testing.assert_close(torch.stack(shares), torch.tensor([0.25, 1.0, 16.0]), atol=0, rtol=0.02)


def test_linear_path_is_least_squares_from_the_codes_around_a_token(fitted, images):
    with torch.no_grad():
        tokens = fitted.get_image_tokens(images)
        codes = fitted.quantizer.get_codebook_entry(tokens).double().numpy()  # (B, 4, 4, 12)
    padded = np.pad(codes, ((0, 0), (1, 1), (1, 1), (0, 0)))
    around = np.concatenate([padded[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)], axis=-1)
    inputs, targets = around.reshape(-1, 9 * 12), patches_of(images)
    alpha = RIDGE * inputs.var(0).mean() * len(inputs)
    predicted = Ridge(alpha=alpha).fit(inputs, targets).predict(inputs)
    painted = predicted.reshape(-1, 4, 4, 8, 8, 3).transpose(0, 5, 1, 3, 2, 4).reshape(-1, 3, 32, 32) * 0.5 + 0.5
    with torch.no_grad():
        ours = fitted.decode(tokens).decoded_pixel_values.numpy()
    np.testing.assert_allclose(ours, painted, atol=2e-3)  # patches were kept in half precision


def test_before_the_first_step_the_model_is_the_fitted_map(fitted, images):
    path = fitted.decoder.linear_path
    with torch.no_grad():
        output = fitted(images)
        codes = fitted.quantizer.get_codebook_entry(output.image_tokens).permute(0, 3, 1, 2)
        patches = torch.nn.functional.conv2d(codes, path.to_patches.weight, path.to_patches.bias, padding=1)
        map_alone = torch.nn.functional.pixel_shuffle(
            patches.unflatten(1, (64, 3)).transpose(1, 2).flatten(1, 2), 8
        )  # pixel_shuffle has channels first
    torch.testing.assert_close(output.decoded_pixel_values, map_alone * 0.5 + 0.5, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "mixing, kernel", [("attention", 1), ("attention", 3), ("convolution", 3), ("both", 3), ("both", 5)]
)
def test_every_decoder_starts_from_the_map_and_learns_the_rest(mixing, kernel, images):
    model = fused_model(decoder_mixing=mixing, decoder_linear_path=kernel)
    model.initialize_codebook(images.split(16))
    with torch.no_grad():
        output = model(images)
        torch.testing.assert_close(model.decode(output.image_tokens).decoded_pixel_values, output.decoded_pixel_values)
        wide = model(smooth_images(2, size=40)[..., :24])  # any grid
    assert wide.decoded_pixel_values.shape == (2, 3, 40, 24)
    model.train()
    model(images).loss.backward()
    without = [name for name, p in model.decoder.named_parameters() if p.grad is None]
    assert not without
    assert model.decoder.decoder_pred.weight.grad.abs().sum() > 0
    optimizer = torch.optim.Adam(model.decoder.parameters(), 1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        model(images).reconstruction_loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert psnr(model.eval()(images).decoded_pixel_values, images) > psnr(output.decoded_pixel_values, images)


def test_pixels_come_back_where_the_last_layer_alone_has_lost_them(images):
    """On images that the fit has not seen. (Random layers lose pixels, too.)"""
    others = smooth_images(16, seed=7)
    fused = fused_model()
    alone = fused_model(encoder_layers=None, pixel_weight=None, codebook_dim=None)
    for model in (fused, alone):
        model.initialize_codebook(images.split(16))
    with torch.no_grad():
        assert psnr(fused(others).decoded_pixel_values, others) > psnr(alone(others).decoded_pixel_values, others) + 1


def test_a_plain_model_gets_a_linear_path_too(images):
    """The last layer's codes, without projections: the path takes the codes as they are."""
    model = fused_model(encoder_layers=None, pixel_weight=None, codebook_dim=None, codebook_init="kmeans")
    model.initialize_codebook(images.split(16))
    assert isinstance(model.decoder.linear_path.to_codes, torch.nn.Identity)
    with torch.no_grad():
        output = model(images)
    mean = images.mean((0, 2, 3), keepdim=True)
    assert psnr(output.decoded_pixel_values, images) > psnr(mean.expand_as(images), images)


# Batches -------------------------------------------------------------------------------------------------------------


def same_weights(one, other, **tolerance) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_an_iterator_that_can_be_read_once_is_enough(fitted, images):
    model = fused_model()
    model.initialize_codebook(iter(images.split(16)))
    same_weights(model, fitted, atol=0, rtol=0)


def test_the_encoder_sees_every_image_once(images):
    model, seen = fused_model(), []
    model.encoder.register_forward_hook(lambda *_, **__: seen.append(1))
    model.initialize_codebook(images.split(16))
    assert len(seen) == len(images.split(16))


def test_a_bounded_sample_of_whole_images_is_kept(monkeypatch, fitted, images, caplog):
    model = fused_model()
    latents, patches = fitted.get_latents(images), model._patches(images)
    one = 2 * patches[0].numel() + 2 * patches.shape[1] * model.config.quantized_features  # in half precision
    monkeypatch.setattr(modeling_simvq, "MOST_BYTES", 10 * one + 1)
    with torch.no_grad():
        sample = model._fit_to_images(images.split(7), torch.Generator().manual_seed(0))
    where = [(kept == patches.half()).flatten(1).all(1).nonzero().item() for _, kept, _ in sample]
    assert len(set(where)) == len(sample) == 10 and max(where) > 20  # whole images, none twice, not only the first
    # projections are those of all images, not of the sample; features were rounded to half precision
    torch.testing.assert_close(torch.stack([kept for kept, _, _ in sample]), latents[where], atol=0.02, rtol=0.01)
    assert model.config.latents_fit == fitted.config.latents_fit


def test_same_seed_same_fit_and_order_of_batches_does_not_matter_for_projections(fitted, images):
    again, shuffled = fused_model(), fused_model()
    again.initialize_codebook(images.split(16))
    same_weights(again, fitted, atol=0, rtol=0)
    shuffled.initialize_codebook(images.flip(0).split(5))
    for name in ("project_in", "project_out"):
        same_weights(shuffled.get_submodule(name), fitted.get_submodule(name), atol=1e-5, rtol=1e-5)


def test_moments_are_those_of_numpy_in_any_number_of_parts():
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * 3 + 50
    for parts in (1, 7, 500):
        moments = Moments(6, torch.device("cpu"))
        for part in rows.chunk(parts):
            moments.add(part)
        np.testing.assert_allclose(moments.mean, rows.double().numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(rows.double().numpy().T, bias=True), atol=1e-9)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_fit_what_one_fits(fitted, images, tmp_path):
    torch.save(images, tmp_path / "images.pt")
    (tmp_path / "program.py").write_text(f"""
import os, sys, torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_fused_latents import fused_model
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
images = torch.load("images.pt", weights_only=True)
model = fused_model()
model.initialize_codebook(images[rank * 24 : rank * 24 + 24].split(8))
torch.save((model.state_dict(), model.config.latents_fit), f"rank{{rank}}.pt")
torch.distributed.barrier()
os._exit(0)  # gloo's threads may abort a process that ends before they do
""")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "program.py"]
    done = subprocess.run(
        [sys.executable, *launch], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0][1] == ranks[1][1] == fitted.config.latents_fit
    for name, tensor in ranks[0][0].items():
        assert torch.equal(tensor, ranks[1][0][name]), name
    for name in ("project_in.weight", "project_in.bias", "project_out.weight", "project_out.bias"):
        torch.testing.assert_close(ranks[0][0][name], fitted.state_dict()[name], atol=1e-6, rtol=1e-6)


# Files, graphs, and what is refused ----------------------------------------------------------------------------------


def test_saved_and_loaded_through_automodel_alone(fitted, images, tmp_path):
    fitted.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        output = fitted(images[:4])
    torch.save((images[:4], output.image_tokens, output.decoded_pixel_values), tmp_path / "expected.pt")
    code = """
import torch
from transformers import AutoModel
images, tokens, pixels = torch.load("expected.pt", weights_only=True)
model = AutoModel.from_pretrained("saved", trust_remote_code=True)
output = model(images)
assert torch.equal(output.image_tokens, tokens) and torch.equal(output.decoded_pixel_values, pixels)
print(model.config.latents_fit["tokens"])
"""
    assert run(code, tmp_path, HF_HOME=str(tmp_path / "home")).strip() == str(48 * 16)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["pixel_weight"] == 2.0


@pytest.mark.parametrize("mixing", ["attention", "convolution", "both"])
def test_compiled_and_exported(mixing, images):
    model = fused_model(decoder_mixing=mixing)
    model.initialize_codebook(images.split(16))
    with torch.no_grad():
        expected = model(images[:2])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images[:2])
        exported = torch.export.export(model, (images[:2],)).module()(images[:2])
    for output in (compiled, exported):
        assert torch.equal(output.image_tokens, expected.image_tokens)
        torch.testing.assert_close(output.decoded_pixel_values, expected.decoded_pixel_values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"encoder_layers": [1, 3]}, ("0 to 2", "[1, 3]")),
        ({"codebook_dim": None}, ("pixel_weight", "codebook_dim")),
        ({"encoder_layers": [2]}, ("encoder_layers", "[2]")),
        ({"encoder_layers": None}, ("encoder_layers", "None")),
        ({"codebook_dim": 225}, ("225", "224", "192")),
        ({"pixel_weight": 0}, ("pixel_weight", "0")),
        ({"pixel_weight": -1.0}, ("pixel_weight", "-1")),
        ({"use_simvq": False}, ("pixel_weight", "use_simvq")),
        ({"num_channels": 1}, ("1", "3")),
        ({"decoder_linear_path": 2}, ("decoder_linear_path", "2")),
        ({"decoder_mixing": "mlp"}, ("decoder_mixing", "mlp")),
        ({"decoder_mixing": "convolution", "decoder_learned_positions": True}, ("decoder_learned_positions",)),
        ({"pixel_weight": None, "encoder_layers": None, "codebook_dim": 40}, ("40", "32", "decoder_linear_path")),
    ],
)
def test_what_cannot_be_is_named(fields, words):
    with pytest.raises(ValueError) as error:
        tiny_config(**{**FUSED, "decoder_linear_path": 3, **fields})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.full((8, 3, 32, 32), 0.25), "all these images are the same"),
        (smooth_images(2), "32 latents cannot initialize 40 codes"),
        (torch.rand(8, 1, 32, 32), r"\(8, 1, 32, 32\)"),
    ],
)
def test_images_that_do_not_do_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        fused_model().initialize_codebook([images])


def test_painting_without_a_fit_is_told_once(monkeypatch, images):
    said = []
    monkeypatch.setattr("tokenizer_simvq.logger.warning_once", said.append)
    model = fused_model()
    model(images[:1])
    assert len(said) == 1 and "initialize_codebook" in said[0]
    model.initialize_codebook(images.split(16))
    said.clear()
    model(images[:1])
    assert not said


def test_default_is_todays_model():
    """No field of the fusion changes a model that does not use it."""
    config = tiny_config(codebook_dim=8)
    torch.manual_seed(0)
    names = list(VQRAEModel(config).state_dict())
    assert not any("linear_path" in name or "local" in name for name in names)
    assert config.decoder_in_features == config.quantized_features == config.hidden_size
    assert VQRAEConfig().pixel_weight is None and VQRAEConfig().decoder_mixing == "attention"


def test_fuse_refuses_numbers_that_are_not_finite():
    moments = Moments(6, torch.device("cpu"))
    moments.add(torch.full((4, 6), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        fuse(moments, 2, 2, 1.0, 2, [0.5])
