"""k-means codes: what SimVQ.fit makes, how the model and the Trainer use it, and the watch over the codebook."""

import json
import sys

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file
from sklearn.cluster import KMeans
from test_loading import ROOT
from test_training import make_trainer

from configuration_simvq import VQRAEConfig
from eval.metrics import CodebookWindow
from modeling_simvq import VQRAEModel
from quantization_simvq import SimVQ, kmeans
from train_hf import ModelArguments, load_model


def skewed(count: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    """Latents like those of frozen encoders: a large offset, and two directions with most of the variance."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.cat([torch.tensor([6.0, 4.0]), torch.full((dim - 2,), 0.3)])
    return torch.randn(count, dim, generator=generator) * scale + 5


def test_kmeans_is_lloyds_algorithm():
    samples = skewed(600)
    generator = torch.Generator().manual_seed(3)
    first = samples[torch.randperm(600, generator=torch.Generator().manual_seed(3))[:20]]
    ours = kmeans(samples, 20, 5, generator)
    theirs = KMeans(20, init=first.numpy(), n_init=1, max_iter=5, tol=0, algorithm="lloyd").fit(samples.numpy())
    torch.testing.assert_close(ours, torch.from_numpy(theirs.cluster_centers_).float(), atol=1e-4, rtol=0)


def test_centroids_without_samples_are_replaced():
    samples = torch.cat([torch.full((98, 4), 3.0), torch.ones(2, 4)])  # most first centroids coincide
    centroids = kmeans(samples, 8, 3, torch.Generator().manual_seed(0))
    assert all((centroid == samples).all(1).any() for centroid in centroids)


def test_fitted_codes_are_the_centroids_and_entries_have_the_scale_of_gaussian_ones():
    samples, quantizer = skewed(2000), SimVQ(50, 16)
    quantizer.fit(samples, iterations=4, seed=1)
    centroids = kmeans(samples, 50, 4, torch.Generator().manual_seed(1))
    torch.testing.assert_close(quantizer.get_codebook_entry(torch.arange(50)), centroids, atol=1e-4, rtol=0)
    assert 0.2 < quantizer.embedding.weight.norm(dim=1).mean() < 2
    assert "embedding.weight" not in dict(quantizer.named_parameters())
    assert quantizer.get_codebook_usage() == 0


def test_fitted_codes_are_a_fixed_point_and_gaussian_ones_are_not():
    samples = skewed(2000)
    gradients = {}
    for iterations in (40, None):
        torch.manual_seed(0)
        quantizer = SimVQ(20, 16, legacy=False)
        if iterations:
            quantizer.fit(samples, iterations)
        quantizer(samples[None])[1].backward()
        gradients[iterations] = quantizer.embedding_proj.weight.grad.norm()
    assert gradients[40] < 1e-2 * gradients[None]


def test_latents_in_a_subspace_are_fitted():
    """LayerNorm leaves a direction without variance."""
    samples = torch.nn.functional.layer_norm(skewed(500), (16,))
    quantizer = SimVQ(30, 16)
    quantizer.fit(samples)
    assert all(tensor.isfinite().all() for tensor in quantizer.state_dict().values())
    quantizer(samples[None])
    assert quantizer.get_codebook_usage() == 1


@pytest.mark.parametrize(
    "samples, message",
    [
        (torch.randn(7, 4), "7 latents.*8 codes"),
        (torch.randn(20, 5), r"\(N, 4\).*\(20, 5\)"),
        (torch.full((20, 4), float("nan")), "NaN"),
    ],
)
def test_bad_samples_are_named(samples, message):
    with pytest.raises(ValueError, match=message):
        SimVQ(8, 4).fit(samples)


def batches(count: int = 40):
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.rand(4, 3, 32, 32, generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("codebook_dim", [None, 8])
def test_model_is_initialized_the_same_for_a_seed_recorded_and_saved(tmp_path, codebook_dim):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = VQRAEModel(tiny_config(codebook_dim=codebook_dim)).train()
        decoder = model.decoder.decoder_pred.weight.clone()
        model.initialize_codebook(batches(), latents_per_code=20, seed=seed)
        states.append(model.quantizer.state_dict())
        assert model.training and torch.equal(decoder, model.decoder.decoder_pred.weight)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["embedding.weight"], states[2]["embedding.weight"])
    model(torch.cat([batch["pixel_values"] for batch in batches()]))
    assert model.quantizer.get_codebook_usage() > 0.9

    model.save_pretrained(tmp_path)
    loaded = VQRAEModel.from_pretrained(tmp_path)
    assert (loaded.config.codebook_init, loaded.config.codebook_init_latents) == ("kmeans", 64 * 20)
    assert torch.equal(loaded.quantizer.embedding.weight, model.quantizer.embedding.weight)


def test_sample_is_uniform_over_all_batches_in_bounded_memory(tiny_model, monkeypatch):
    """Every latent of the stream equally likely, and no more of them kept than asked for."""
    kept = []
    monkeypatch.setattr(SimVQ, "fit", lambda self, samples, *args: kept.append(samples[:, 0].clone()))
    number = 0

    def numbered(pixel_values):
        nonlocal number
        number += 1
        return torch.full((len(pixel_values), 16, 32), float(number - 1))

    monkeypatch.setattr(tiny_model, "get_latents", numbered)
    for seed in range(20):
        number = 0
        tiny_model.initialize_codebook((torch.rand(1, 3, 32, 32) for _ in range(50)), latents_per_code=2, seed=seed)
    assert all(len(sample) == 128 for sample in kept)  # of 800
    histogram = torch.histc(torch.cat(kept), bins=5, min=0, max=50)
    assert (histogram / histogram.sum() - 0.2).abs().max() < 0.03


def test_plain_codebooks_and_unknown_ways_are_refused():
    with pytest.raises(ValueError, match="use_simvq"):
        VQRAEModel(tiny_config(use_simvq=False)).initialize_codebook(batches())
    with pytest.raises(ValueError, match="use_simvq"):
        tiny_config(use_simvq=False, codebook_init="kmeans")
    with pytest.raises(ValueError, match="codebook_init"):
        VQRAEConfig(codebook_init="pca")


def test_trainer_initializes_before_training_and_not_on_resume(tmp_path, image_folder, monkeypatch):
    calls = []
    original = VQRAEModel.initialize_codebook
    monkeypatch.setattr(
        VQRAEModel, "initialize_codebook", lambda self, *a, **k: calls.append(1) or original(self, *a, **k)
    )

    def train(output_dir, checkpoint=None, **overrides):
        torch.manual_seed(0)
        model = VQRAEModel(tiny_config(codebook_init="kmeans"))
        trainer = make_trainer(model, image_folder, output_dir, max_steps=6, save_steps=3, **overrides)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = train(tmp_path / "whole")
    assert len(calls) == 1 and whole.model.config.codebook_init_latents == 64 * 256
    resumed = train(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert len(calls) == 1 and resumed.model.config.codebook_init_latents == 64 * 256
    states = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    saved = load_file(tmp_path / "whole" / "checkpoint-3" / "model.safetensors")
    assert torch.equal(saved["quantizer.embedding.weight"], states[0]["quantizer.embedding.weight"])
    assert json.loads((tmp_path / "whole" / "checkpoint-3" / "config.json").read_text())["codebook_init"] == "kmeans"


def test_images_that_give_no_batch_end_the_fit(tmp_path, image_folder):
    """It once looked for crops without an end."""
    model = VQRAEModel(tiny_config(codebook_init="kmeans"))
    options = {"per_device_train_batch_size": 64, "dataloader_drop_last": True}
    trainer = make_trainer(model, image_folder, tmp_path, max_steps=1, **options)
    with pytest.raises(ValueError, match="fewer than a batch with --dataloader_drop_last"):
        trainer.train()


def test_a_resumed_gaussian_run_stays_gaussian(tmp_path, image_folder):
    """Recorded as k-means without latents, its trained codes would be fitted anew by whoever trains on."""
    first = make_trainer(VQRAEModel(tiny_config()), image_folder, tmp_path, max_steps=3, save_steps=3)
    first.train()
    asked = VQRAEModel(tiny_config(codebook_init="kmeans"))
    resumed = make_trainer(asked, image_folder, tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert (asked.config.codebook_init, asked.config.codebook_init_latents) == ("gaussian", None)
    assert torch.equal(asked.quantizer.embedding.weight, first.model.quantizer.embedding.weight)


def test_the_quantizers_learning_rate_is_a_multiple(tmp_path, image_folder):
    trainer = make_trainer(VQRAEModel(tiny_config()), image_folder, tmp_path, quantizer_lr_multiplier=0.25)
    optimizer = trainer.create_optimizer()
    model, rates = trainer.model, {}
    for group in optimizer.param_groups:
        rates |= {id(p): group["lr"] for p in group["params"]}
    own = {id(p) for p in model.quantizer.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(rates) == len(trainable) and len(own) == 2
    assert all(rates[id(p)] == (0.25e-2 if id(p) in own else 1e-2) for p in trainable)


def test_window_holds_at_least_64_tokens_per_code_and_less_than_twice_that_beyond_one_addition():
    window, history = CodebookWindow(10), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        history.append(torch.randint(0, 5, (10,), generator=generator))
        counts = window.add(history[-1])
        # the latest additions, and no others
        length = next(n for n in range(1, len(history) + 1) if torch.stack(history[-n:]).sum() == counts.sum())
        assert torch.equal(counts, torch.stack(history[-length:]).sum(0))
        assert counts.sum() >= 640 or length == len(history)
        assert counts.sum() < 2 * 640 + 2 * 50


def test_collapse_is_reported_once_with_its_likely_causes(tmp_path, image_folder, monkeypatch):
    messages = []
    monkeypatch.setattr("training.monitoring.logger.warning", messages.append)
    model = VQRAEModel(tiny_config(codebook_size=16))
    model.quantizer.embedding_proj.weight.data.zero_()  # one code for all
    trainer = make_trainer(model, image_folder, tmp_path, max_steps=6, warmup_steps=3, learning_rate=0.0)
    trainer.train()
    assert [entry.get("codebook_utilization") for entry in trainer.state.log_history[:6]] == [1 / 16] * 6
    assert len(messages) == 1 and "6.2% of the codes" in messages[0] and "kmeans" in messages[0]


@pytest.mark.parametrize(
    "fields, asked_for, expected",
    [
        ({}, None, "kmeans"),
        ({"codebook_dim": 8}, None, "gaussian"),
        ({"codebook_dim": 8}, "kmeans", "kmeans"),
        ({}, "gaussian", "gaussian"),
        ({"use_simvq": False}, None, "gaussian"),
    ],
)
def test_start_of_a_new_model_in_the_script(fields, asked_for, expected):
    config = tiny_config(**fields).to_dict()
    config = {name: config[name] for name in ("encoder_config", "image_size", "decoder_patch_size", *fields)}
    assert load_model(ModelArguments(model_config=config, codebook_init=asked_for), {}).config.codebook_init == expected


def test_script_of_the_benchmark(tmp_path, image_folder, monkeypatch, capsys):
    """A smoke run of every part, and a second one that finds all done."""
    from transformers import AutoConfig, Dinov2Model

    from benchmarks import collapse

    encoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14, "image_size": 28}
    Dinov2Model(AutoConfig.for_model("dinov2", **encoder)).save_pretrained(tmp_path / "encoder")
    settings = json.loads((ROOT / "configs" / "collapse.json").read_text())
    tiny = {"steps": 8, "count_all_crops_every": 4, "latents_per_code": 4, "iterations": 1}
    settings |= {"image_size": 28, "crops": 24, "batch_size": 3, "warmup_steps": 1}
    settings |= {part: {"8": settings[part]["1024"] | tiny} for part in ("stage1", "joint", "moving")}
    settings |= {"quantizer": {**tiny, "codes": 8}}
    settings["small_vit"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 28}
    settings["decoder"] |= {"decoder_hidden_size": 32, "decoder_intermediate_size": 64}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    arguments = ["collapse.py", "--encoder", "encoder", "--data", str(image_folder)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--config", "settings.json", "--output_dir", "out"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # and no download
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    collapse.main()
    assert "Run 23 of 23" in capsys.readouterr().out
    assert {"results.md", "results.json", "curves.png", "pictures.png"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert not list((tmp_path / "out").rglob("unfinished*"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["stage1/8/SimVQ, k-means"]["history"][-1]["all_crops"]["codebook_tokens"] == 24 * 4
    collapse.main()
    assert "Run" not in capsys.readouterr().out


def test_training_random_codes_on_a_frozen_encoder_warns_at_the_first_step(monkeypatch, pixels):
    said = []
    monkeypatch.setattr("tokenizer_simvq.logger.warning_once", said.append)
    VQRAEModel(tiny_config()).eval()(pixels)  # not training
    for fields in ({"freeze_encoder": False}, {"codebook_dim": 8}):  # latents can come to the codes
        VQRAEModel(tiny_config(**fields)).train()(pixels)
    fitted = VQRAEModel(tiny_config(codebook_size=8)).train()
    fitted.initialize_codebook([pixels])
    fitted(pixels)
    assert not said
    VQRAEModel(tiny_config()).train()(pixels)
    assert len(said) == 1 and "frozen" in said[0] and "initialize_codebook" in said[0]
