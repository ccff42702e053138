"""The SimVQ paper's own tokenizers, against numbers that the reference itself computed, and the conversion of its
checkpoints.

fixtures/simvq_gan/reference.safetensors holds what the reference's VQModel computes with tiny networks; the script
beside it recorded that. Checkpoints are made here as Lightning writes them, from the recorded names and shapes.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_config
from fixtures.simvq_gan.record import FIXTURE, draw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_loading import ROOT, run
from test_losses import Perceptual
from test_training import make_trainer
from transformers import AutoConfig, AutoImageProcessor, AutoModel

import convert.simvq_checkpoint
import train_hf
from configuration_simvq_gan import SimVQGANConfig
from convert.simvq_checkpoint import convert as convert_checkpoint
from modeling_simvq import VQRAEModel
from modeling_simvq_gan import SimVQGANModel
from reading.models import load_pretrained


with safe_open(FIXTURE, "pt") as file:
    NAMES, CONFIG = (json.loads(file.metadata()[name]) for name in ("names", "config"))
    RECORDED = {name: file.get_tensor(name) for name in file.keys()}
PIXELS = RECORDED["pixels"] / 2 + 0.5  # in [0, 1]
SMALL = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "latent_channels": 16}


def small_model(**overrides) -> SimVQGANModel:
    torch.manual_seed(0)
    return SimVQGANModel(SimVQGANConfig(**{**SMALL, "image_size": 32, "codebook_size": 64, **overrides}))


def reference_state_dict() -> dict[str, torch.Tensor]:
    """Every key of the reference's; the loss networks, which are not needed, are a number each."""
    return {name: torch.zeros(1) if "loss" in name else draw(name, shape) for name, shape in NAMES.items()}


def write_checkpoint(folder: Path, state_dict=None, config=CONFIG, **extra) -> dict[str, Path]:
    """The arguments of `convert`."""
    checkpoint = {"epoch": 49, "global_step": 250250, "pytorch-lightning_version": "2.2.5", "optimizer_states": [{}]}
    torch.save(checkpoint | {"state_dict": state_dict or reference_state_dict()} | extra, folder / "reference.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return {
        "checkpoint": folder / "reference.ckpt",
        "config": folder / "config.yaml",
        "output_dir": folder / "converted",
    }


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    files = write_checkpoint(tmp_path_factory.mktemp("reference"))
    convert_checkpoint(**files)
    return files["output_dir"]


# The reference's numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_converted_checkpoint_computes_what_the_reference_computes(weights, tmp_path):
    """Latents, indices, loss and pixels, with the averages and with the raw weights."""
    files = write_checkpoint(tmp_path)
    convert_checkpoint(**files, weights=weights)
    model = SimVQGANModel.from_pretrained(files["output_dir"])
    with torch.no_grad():
        output = model(PIXELS)
    recorded = {name: RECORDED[f"{weights}.{name}"] for name in ("latents", "indices", "loss", "reconstruction")}
    features = recorded["latents"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(output.last_hidden_state, features, atol=1e-5, rtol=0)
    assert torch.equal(output.image_tokens, recorded["indices"]) and len(output.image_tokens.unique()) > 50
    torch.testing.assert_close(output.embedding_loss, recorded["loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.decoded_pixel_values, recorded["reconstruction"] / 2 + 0.5, atol=1e-5, rtol=0)
    assert not torch.equal(RECORDED["ema.indices"], RECORDED["raw.indices"])


def test_tokens_decode_to_the_forward_reconstruction_where_the_reference_forgets_the_projection(converted):
    model = SimVQGANModel.from_pretrained(converted)
    with torch.no_grad():
        output = model(PIXELS)
        decoded = model.decode(model.encode(PIXELS).image_tokens).decoded_pixel_values
        from_features = model.decode_latents(output.quantized_last_hidden_state, (8, 6)).decoded_pixel_values
    torch.testing.assert_close(decoded, output.decoded_pixel_values, atol=1e-5, rtol=0)
    torch.testing.assert_close(from_features, output.decoded_pixel_values, atol=1e-5, rtol=0)
    torch.testing.assert_close(decoded, RECORDED["ema.reconstruction"] / 2 + 0.5, atol=1e-5, rtol=0)
    assert (RECORDED["ema.from_indices"] - RECORDED["ema.reconstruction"]).abs().mean() > 0.1


def test_automodel_in_a_fresh_process(converted, tmp_path):
    save_file({"pixels": PIXELS, "indices": RECORDED["ema.indices"]}, tmp_path / "expected.safetensors")
    code = f"""
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel
config = AutoConfig.from_pretrained({str(converted)!r}, trust_remote_code=True)
model = AutoModel.from_pretrained({str(converted)!r}, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained({str(converted)!r}, trust_remote_code=True)
expected = load_file("expected.safetensors")
assert torch.equal(model.get_image_tokens(expected["pixels"]), expected["indices"])
pixels = processor(Image.new("RGB", (50, 40), (255, 0, 0)), return_tensors="pt").pixel_values
assert processor.postprocess(model(pixels).decoded_pixel_values)[0].size == (32, 32)
assert processor.resample == Image.Resampling.BILINEAR
assert "quantizer.embedding.weight" not in dict(model.named_parameters())
print(config.model_type, type(model).__module__)
"""
    model_type, module = run(code, tmp_path, HF_HOME=str(tmp_path / "home")).split()
    assert model_type == "simvq_gan" and "transformers_modules" in module


# The model -----------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_published_recipe():
    """configs/imagenet_simvq_128_B.yaml: 128 px, 8 px a token, 64.2 M weights."""
    config = SimVQGANConfig()
    assert (config.image_size, config.decoder_patch_size, config.grid_size, config.latent_size) == (128, 8, 16, 128)
    assert not config.legacy and config.commitment_cost == 0.25 and config.image_mean == [0.5] * 3
    with torch.device("meta"):
        model = SimVQGANModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 64_150_915


def test_configuration_round_trip(tmp_path):
    config = SimVQGANConfig(**SMALL, codebook_size=64, image_std=[0.1, 0.2, 0.3], freeze_encoder=True)
    config.save_pretrained(tmp_path)
    assert SimVQGANConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "fields, numbers",
    [
        ({"base_channels": 48}, ("base_channels", "48", "32")),
        ({"channel_multiplier": []}, ("channel_multiplier",)),
        ({"channel_multiplier": [1, 0]}, ("channel_multiplier", "0")),
        ({"num_res_blocks": 0}, ("num_res_blocks", "0")),
        ({"image_size": 33}, ("33", "2")),
        ({"codebook_size": 0}, ("codebook_size", "0")),
        ({"image_mean": [0.5]}, ("1", "3")),
    ],
)
def test_impossible_configurations_are_named(fields, numbers):
    with pytest.raises(ValueError) as error:
        SimVQGANConfig(**SMALL | {"image_size": 32} | fields)
    assert all(number in str(error.value) for number in numbers)


def test_methods_and_shapes_are_those_of_a_vqrae():
    """On a wide image; the thin methods agree with encode and decode."""
    model = small_model().eval()
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    encoded, output = model.encode(pixels), model(pixels)
    assert encoded.image_tokens.shape == (2, 8, 12) and encoded.last_hidden_state.shape == (2, 96, 16)
    assert encoded.quantized_last_hidden_state.shape == (2, 96, 16)
    assert output.decoded_pixel_values.shape == pixels.shape
    assert model.last_layer is model.decoder.conv_out.weight  # the reference's get_last_layer
    assert type(output) is type(VQRAEModel(tiny_config())(torch.rand(1, 3, 32, 32)))
    assert torch.equal(model.get_image_features(pixels).last_hidden_state, encoded.last_hidden_state)
    assert torch.equal(model.get_image_tokens(pixels), encoded.image_tokens)
    decoded = model.decode(encoded.image_tokens).decoded_pixel_values
    assert torch.equal(model.decode_image_tokens(encoded.image_tokens), decoded)
    squared = (output.decoded_pixel_values - pixels).pow(2).mean()
    torch.testing.assert_close(output.loss, squared + output.embedding_loss)
    assert model(pixels, return_loss=False).loss is None
    with pytest.raises(ValueError, match="16 x 25.*2"):
        model(torch.rand(1, 3, 16, 25))
    with pytest.raises(ValueError, match="16"):
        model.decode_latents(torch.rand(1, 16, 32))


def test_new_weights_are_drawn_as_by_the_reference():
    """PyTorch's defaults, which are uniform up to 1 / sqrt(fan in), not transformers' Gaussian of 0.02."""
    model = small_model()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4:
            bound = parameter[0].numel() ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
    assert model.quantizer.embedding.weight.std() == pytest.approx(16**-0.5, rel=0.05)


def test_reloading_keeps_the_codebook_frozen_and_the_weights(tmp_path):
    model = small_model(freeze_encoder=True)
    model.save_pretrained(tmp_path)
    loaded = SimVQGANModel.from_pretrained(tmp_path).train()
    loaded.init_weights()  # nothing of what was loaded moves
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert "quantizer.embedding.weight" not in dict(loaded.named_parameters())
    assert not loaded.encoder.training and not any(p.requires_grad for p in loaded.encoder.parameters())
    trained = SimVQGANModel.from_pretrained(tmp_path, freeze_encoder=False).train()
    trained(torch.rand(2, 3, 32, 32)).loss.backward()
    assert trained.encoder.training and trained.quantizer.embedding.weight.grad is None
    assert [name for name, parameter in trained.named_parameters() if parameter.grad is None] == []


def test_half_precision_keeps_the_codebook(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    half = SimVQGANModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.encoder.conv_in.weight.dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for tensor in half.quantizer.state_dict().values())
    output = half(torch.rand(1, 3, 32, 32))
    decoded = half.decode(output.image_tokens).decoded_pixel_values
    torch.testing.assert_close(decoded, output.decoded_pixel_values, atol=1e-5, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, pixels = small_model().train(), torch.rand(2, 3, 32, 32)
    model(pixels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(pixels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


# Training and evaluation ---------------------------------------------------------------------------------------------


def test_training_moves_everything_but_the_codebook(tmp_path, image_folder):
    """Adaptive GAN weight, distillation, averages and learning rates by group, after a reload; k-means codes first."""
    small_model(codebook_init="kmeans").save_pretrained(tmp_path / "start")
    model = load_pretrained(str(tmp_path / "start"), {})
    trainer = make_trainer(
        model, image_folder, tmp_path / "out", gan_weight=0.1, gan_adaptive=True, distillation_weight=1.0,
        encoder_learning_rate=1e-3, ema_decay=0.9,
    )  # fmt: skip
    fit, before = trainer.initialize_codebook, {}

    def fit_and_remember():
        fit()
        before.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    trainer.initialize_codebook = fit_and_remember
    trainer.train()
    assert model.config.codebook_init_latents == 64 * 256
    after = model.state_dict()
    assert {name for name in after if torch.equal(before[name], after[name])} == {"quantizer.embedding.weight"}
    first, second = trainer.state.log_history[:2]
    assert first["adaptive_weight"] > 0 and first["loss_distillation"] == 0 < second["loss_distillation"]
    assert first["learning_rate_encoder"] == pytest.approx(0.1 * first["learning_rate_decoder"])


def test_the_references_recipe_goes_on_from_a_converted_checkpoint(
    converted, tmp_path, image_folder, monkeypatch, capsys
):
    """configs/simvq_128.json, whose ViT is turned down; what is saved loads again, and says what it is."""
    monkeypatch.setattr("training.losses.PerceptualLoss", Perceptual)
    tiny = {
        "model_name_or_path": converted, "train_data": image_folder, "eval_data": image_folder, "max_steps": 2,
        "output_dir": tmp_path / "out", "per_device_train_batch_size": 2, "dataloader_num_workers": 0,
        "logging_steps": 1, "eval_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False,
        "max_eval_samples": 2, "save_steps": 2,
    }  # fmt: skip
    flags = [str(ROOT / "configs" / "simvq_128.json")]
    flags += [text for name, value in tiny.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train_hf.py", *flags])
    with pytest.raises(SystemExit):
        train_hf.main()
    error = capsys.readouterr().err
    assert "SimVQGANConfig, which has no codebook_dim, decoder_patch_size, encoder_config" in error and "{}" in error
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr(sys, "argv", ["train_hf.py", *flags, "--model_config", "{}"])
    train_hf.main()
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][0]
    assert {"loss_l1", "loss_lpips", "loss_vq", "loss_gan", "loss_discriminator"} <= log.keys()
    assert log["learning_rate_encoder"] == log["learning_rate_quantizer"] == log["learning_rate_decoder"] == 1e-4
    start, end = (load_file(folder / "model.safetensors") for folder in (converted, tmp_path / "out"))
    assert {name for name in start if torch.equal(start[name], end[name])} == {"quantizer.embedding.weight"}
    assert AutoImageProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True).resample == 2  # bilinear
    trained = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert trained.get_image_tokens(PIXELS).shape == (2, 8, 6)
    assert "a convolutional encoder, 512 codes of width 32" in (tmp_path / "out" / "README.md").read_text()


def test_other_models_are_refused_by_the_training_script(tmp_path):
    AutoConfig.for_model("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bert.*vqrae, simvq_gan"):
        load_pretrained(str(tmp_path), {})


def test_evaluation_script_measures_it(converted, tmp_path, image_folder):
    """Under the reference's protocol, at 128 px."""
    model = ["--model_name_or_path", str(converted), "--output_dir", "results", "--data", str(image_folder)]
    run(["-m", "eval.reconstruction", *model, "--protocol", "simvq-128", "--network_metrics"], tmp_path)
    result = json.loads((tmp_path / "results" / "results.json").read_text())
    assert result["source"]["codebook_size"] == 512 and result["num_images"] == 12
    assert result["metrics"]["psnr"] > 0 and result["metrics"]["codebook_tokens"] == 12 * 32 * 32


# What the converter refuses ------------------------------------------------------------------------------------------


def refused(files: dict[str, Path], error=ValueError, **arguments) -> str:
    """The converter's error; nothing is left of what it may have written."""
    folder = files["checkpoint"].parent
    before = sorted(os.listdir(folder))
    with pytest.raises(error) as caught:
        convert_checkpoint(**files, **arguments)
    assert sorted(os.listdir(folder)) == before
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["encoder.mid_block.1.conv2.weight", "quantize.embedding.weight", "model_ema.decoderup2upsampleconv1bias"],
)
def test_a_missing_weight_is_named(tmp_path, name):
    state_dict = reference_state_dict()
    del state_dict[name]
    assert f"Weights missing (1): {name}." in refused(write_checkpoint(tmp_path, state_dict))


@pytest.mark.parametrize("name", ["encoder.mid_block.2.conv2.weight", "model_ema.encoderextra", "quantize.used"])
def test_a_key_without_a_known_use_is_named(tmp_path, name):
    files = write_checkpoint(tmp_path, reference_state_dict() | {name: torch.zeros(1)})
    assert f"Keys without a known use (1): {name}." in refused(files)


def test_a_weight_of_another_shape_is_named(tmp_path):
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    config["model"]["init_args"]["quantconfig"]["params"]["n_e"] = 1024
    message = refused(write_checkpoint(tmp_path, config=config))
    assert "quantize.embedding.weight is (512, 32), expected (1024, 32)" in message


def test_a_checkpoint_without_averages_is_converted_when_asked_for_raw_weights(tmp_path):
    state_dict = {name: tensor for name, tensor in reference_state_dict().items() if not name.startswith("model_ema.")}
    files = write_checkpoint(tmp_path, state_dict)
    assert "--weights raw" in refused(files)
    convert_checkpoint(**files, weights="raw")
    assert torch.equal(
        SimVQGANModel.from_pretrained(files["output_dir"]).get_image_tokens(PIXELS), RECORDED["raw.indices"]
    )


class Foreign:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_pickle_with_a_foreign_class_is_refused_and_not_executed(tmp_path):
    files = write_checkpoint(tmp_path, hyper_parameters=Foreign(tmp_path / "executed"))
    message = refused(files)
    assert f"{os.mkdir.__module__}.mkdir" in message and "tensors.ckpt" in message


def test_the_way_out_that_the_refusal_names_works(tmp_path):
    """Its lines, run by someone who trusts the file, give a checkpoint that is converted."""
    files = write_checkpoint(tmp_path, hyper_parameters=Foreign(tmp_path / "executed"))
    code = refused(files).split("convert that:\n")[1]
    run("\n".join(line.strip() for line in code.splitlines()), tmp_path)
    convert_checkpoint(tmp_path / "tensors.ckpt", files["config"], files["output_dir"])
    assert (files["output_dir"] / "model.safetensors").exists()


def test_damaged_and_other_files_are_named(tmp_path):
    files = write_checkpoint(tmp_path)
    whole = files["checkpoint"].read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        files["checkpoint"].write_bytes(content)
        assert f"{files['checkpoint']} is damaged" in refused(files)
    for content in ([1, 2], {"state_dict": {"a": 1}}, {"model": {}}):
        torch.save(content, files["checkpoint"])
        assert "no Lightning checkpoint" in refused(files)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("class_path",), "taming.models.vq_audio.VQModel", "taming.models.vq_audio.VQModel"),
        (("init_args", "quantconfig", "target"), "os.system", "os.system"),
        (("init_args", "quantconfig", "params", "remap"), "used.npy", "remap is used.npy"),
        (("init_args", "quantconfig", "params", "e_dim"), 64, "e_dim is 64, z_channels is 32"),
        (("init_args", "quantconfig", "params", "rotation"), True, "rotation"),
        (("init_args", "ddconfig", "out_ch"), 1, "out_ch is 1"),
        (("init_args", "ddconfig", "ch"), "wide", "base_channels"),
        (("init_args", "ddconfig", "ch"), 33, "33"),
        (("init_args", "ddconfig"), None, "no config.yaml"),
    ],
)
def test_other_configurations_are_named(tmp_path, path, value, message):
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    place = config["model"]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert message in refused(write_checkpoint(tmp_path, config=config))


def test_the_form_of_the_loss_is_the_configurations_or_the_default_of_the_references_class(tmp_path):
    file = tmp_path / "config.yaml"
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    parameters = config["model"]["init_args"]["quantconfig"]["params"]
    for legacy in (False, True):
        parameters["legacy"] = legacy
        file.write_text(yaml.safe_dump(config))
        assert convert.simvq_checkpoint.read_config(file).legacy == legacy
    del parameters["legacy"], parameters["beta"]
    file.write_text(yaml.safe_dump(config))
    assert convert.simvq_checkpoint.read_config(file).legacy
    assert convert.simvq_checkpoint.read_config(file).commitment_cost == 0.25


def test_nothing_is_overwritten(tmp_path):
    files = write_checkpoint(tmp_path)
    files["output_dir"].mkdir()
    (files["output_dir"] / "mine").touch()
    assert "exists and is not empty" in refused(files)
    assert os.listdir(files["output_dir"]) == ["mine"]


def test_a_folder_that_does_not_load_as_what_was_converted_is_not_kept(tmp_path, monkeypatch):
    save = SimVQGANModel.save_pretrained

    def save_another(self, folder):
        save(self, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["decoder.conv_out.bias"] += 1e-3
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(SimVQGANModel, "save_pretrained", save_another)
    assert "another one" in refused(write_checkpoint(tmp_path), RuntimeError)


def test_script(tmp_path):
    files = write_checkpoint(tmp_path)
    script = ["-m", "convert.simvq_checkpoint"]
    assert "--weights" in run([*script, "--help"], tmp_path)
    arguments = ["--checkpoint", "reference.ckpt", "--config", "config.yaml", "--output_dir", "converted"]
    arguments += ["--license", "mit"]
    output = run([*script, *arguments], tmp_path)
    assert "left behind:  22 of loss.discriminator.* (discriminator)" in output
    assert "512 codes of width 32" in output and "same tokens" in output
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "converted", "reference.ckpt"]
    card = (files["output_dir"] / "README.md").read_text()
    assert "license: mit" in card and "youngsheen/SimVQ" in card and "`reference.ckpt` (the moving average" in card
    loaded = AutoModel.from_pretrained(files["output_dir"], trust_remote_code=True)
    assert torch.equal(loaded.get_image_tokens(PIXELS), RECORDED["ema.indices"])
