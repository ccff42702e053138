"""A RAE becomes a VQRAE: the same encoder and decoder, a new quantizer, and nothing lost on the way.

tests/fixtures/record_rae.py made the records that the references' reconstructions come from.
"""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from fixtures.record_rae import FOLDER, write_source
from PIL import Image
from safetensors.torch import load_file, save_file
from test_loading import run

from convert.rae import main
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import PIXEL_STATISTICS, VQRAEModel


RECORDS = sorted(file.stem for file in FOLDER.glob("*.safetensors"))


@pytest.fixture(autouse=True)
def verbosity():
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture
def source(tmp_path):
    """Writes the source of a record; returns its folder, the arguments that name it, and the record."""

    def write(name: str):
        folder = tmp_path / "source"
        record = write_source(folder, FOLDER / f"{name}.safetensors")
        if name.startswith("diffusers"):
            return folder, ["--diffusers", str(folder)], record
        files = {"rae_config": "configs/stage1/tiny.yaml", "decoder": "decoder.pt", "encoder": "encoder"}
        return folder, [text for key, file in files.items() for text in (f"--{key}", str(folder / file))], record

    return write


def convert(arguments: list[str], output: Path, *more: str) -> VQRAEModel:
    main([*arguments, "--output_dir", str(output), "--codebook_size", "64", *more])
    return VQRAEModel.from_pretrained(output).eval()


@torch.no_grad()
def reconstruct(model: VQRAEModel, pixels: torch.Tensor) -> torch.Tensor:
    """With the quantizer left out."""
    return model.decode_latents(model.get_image_features(pixels).last_hidden_state).decoded_pixel_values


def edit(file: Path, **changes) -> None:
    """Changes tensors of a file; `None` takes one out."""
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    tensors = {name: value for name, value in (tensors | changes).items() if value is not None}
    save_file(tensors, file, {"format": "pt"}) if file.suffix == ".safetensors" else torch.save(tensors, file)


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_params(folder: Path, **changes) -> None:
    """Changes parameters of RAE's configuration."""
    file = folder / "configs" / "stage1" / "tiny.yaml"
    edit_json(file, stage_1={"params": json.loads(file.read_text())["stage_1"]["params"] | changes})


@pytest.mark.parametrize("name", RECORDS)
def test_reconstructions_are_the_references(name, source, tmp_path):
    _, arguments, record = source(name)
    model = convert(arguments, tmp_path / "converted")
    difference = (reconstruct(model, record["pixels"] / 255) - record["reconstruction"]).abs().max()
    print(f"{name}: {difference:.2g}")
    assert difference < 1e-4
    # the positions of this decoder were moved
    assert model.config.decoder_learned_positions == (name == "rae_mae")


@pytest.mark.parametrize("name, patch", [("dinov2", 14), ("mae", 16)])
def test_reconstructions_are_those_of_the_installed_diffusers(name, patch, tmp_path):
    diffusers = pytest.importorskip("diffusers", minversion="0.38")
    torch.manual_seed(0)
    rae = diffusers.AutoencoderRAE(
        encoder_type=name,
        encoder_hidden_size=64,
        encoder_patch_size=patch,
        encoder_num_hidden_layers=2,
        encoder_input_size=16 * patch,
        patch_size=4,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        latents_mean=torch.randn(64, 16, 16),
        latents_std=torch.rand(64, 16, 16),
    ).eval()
    rae.save_pretrained(tmp_path / "source")
    model = convert(["--diffusers", str(tmp_path / "source")], tmp_path / "converted")
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = rae(pixels).sample
    difference = (reconstruct(model, pixels) - expected).abs().max()
    print(f"{name}: {difference:.2g}")
    assert difference < 1e-4


def test_an_encoder_without_a_processor_has_the_statistics_of_its_family(source, tmp_path):
    folder, arguments, _ = source("rae_dinov2")
    (folder / "encoder" / "preprocessor_config.json").unlink()
    config = convert(arguments, tmp_path / "converted").config
    assert (config.image_mean, config.image_std) == PIXEL_STATISTICS["dinov2_with_registers"]


def test_what_is_written(source, tmp_path, capsys):
    _, arguments, record = source("rae_dinov2")
    output = tmp_path / "converted"
    config = convert(arguments, output).config
    assert (config.image_size, config.encoder_input_size, config.grid_size) == (24, 21, 3)
    assert (config.image_mean, config.image_std) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    assert (config.codebook_size, config.codebook_init, config.codebook_init_latents) == (64, "kmeans", None)
    assert "Gaussian" in (output / "README.md").read_text() and "Gaussian" in capsys.readouterr().out
    assert str(tmp_path) not in (output / "README.md").read_text()
    pixels = record["pixels"]
    code = """
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained("converted", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("converted", trust_remote_code=True)
pixels = processor(Image.new("RGB", (50, 40), (255, 0, 0)), return_tensors="pt").pixel_values
tokens = model.encode(pixels).image_tokens
print(tuple(pixels.shape), tuple(tokens.shape), tuple(model.decode(tokens).decoded_pixel_values.shape))
"""
    shapes = run(code, tmp_path, HF_HOME=str(tmp_path / "home"))
    assert shapes.strip() == "(1, 3, 24, 24) (1, 3, 3) (1, 3, 24, 24)"
    assert pixels.shape[2:] == (24, 24)


def test_codes_are_fitted_to_images(source, tmp_path, image_folder):
    _, arguments, _ = source("rae_siglip2")
    model = convert(arguments, tmp_path / "converted", "--data", str(image_folder))
    assert (model.config.codebook_init, model.config.codebook_init_latents) == ("kmeans", 12 * 9)
    processor = VQRAEImageProcessor.from_pretrained(tmp_path / "converted")
    images = [Image.open(file) for file in sorted(image_folder.iterdir())]
    with torch.no_grad():
        encoded = model.encode(processor(images, return_tensors="pt").pixel_values)
    assert len(encoded.image_tokens.unique()) == 64
    error = (encoded.quantized_last_hidden_state - encoded.last_hidden_state).square().mean()
    assert error < 0.3 * encoded.last_hidden_state.var()  # a Gaussian codebook has more than the variance itself


def test_codes_behind_a_projection_stay_gaussian(source, tmp_path):
    _, arguments, record = source("rae_siglip2")
    model = convert(arguments, tmp_path / "converted", "--codebook_dim", "8")
    assert (model.config.codebook_init, model.config.latent_size) == ("gaussian", 8)
    assert (reconstruct(model, record["pixels"] / 255) - record["reconstruction"]).abs().max() < 1e-4


def test_learned_positions_start_as_the_fixed_ones_and_follow_the_image_size(source, tmp_path):
    _, arguments, record = source("rae_mae")
    model = convert(arguments, tmp_path / "converted")
    wide = torch.rand(1, 3, 16, 40)
    learned = reconstruct(model, record["pixels"] / 255), model(wide).decoded_pixel_values
    with torch.no_grad():
        model.decoder.position_offsets.zero_()
    zeroed = reconstruct(model, record["pixels"] / 255), model(wide).decoded_pixel_values
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(learned, zeroed))
    fresh = VQRAEModel(model.config)
    assert fresh.decoder.position_offsets.shape == (1, 24, 3, 3) and not fresh.decoder.position_offsets.any()


def test_the_configuration_names_the_encoder(source, tmp_path, monkeypatch):
    folder, arguments, record = source("rae_mae")
    monkeypatch.chdir(folder)
    model = convert(arguments[:4], tmp_path / "converted")
    assert (reconstruct(model, record["pixels"] / 255) - record["reconstruction"]).abs().max() < 1e-4
    edit_params(folder, encoder_config_path="another")
    with pytest.raises(ValueError, match=r"\['another', 'encoder'\]: choose one with --encoder"):
        convert(arguments[:4], tmp_path / "again")


def test_half_precision_files_become_float32(source, tmp_path):
    folder, arguments, record = source("rae_dinov2")
    half = {name: value.bfloat16() for name, value in torch.load(folder / "decoder.pt", weights_only=True).items()}
    edit(folder / "decoder.pt", **half)
    model = convert(arguments, tmp_path / "converted")
    assert model.dtype == torch.float32 and model.decoder.decoder_pred.weight.dtype == torch.float32
    # the rounded positions of the file, as RAE would use them
    assert model.config.decoder_learned_positions


# what is done to the source, and what the error names
BROKEN = {
    "a decoder weight is missing": (
        "rae_dinov2",
        lambda folder: edit(folder / "decoder.pt", **{"decoder_layers.1.attention.attention.key.bias": None}),
        r"decoder.*missing: decoder_layers\.1\.attention\.attention\.key\.bias",
    ),
    "a decoder weight is left over": (
        "rae_dinov2",
        lambda folder: edit(folder / "decoder.pt", mask_token=torch.zeros(1)),
        "decoder.*1 weight has no place: mask_token",
    ),
    "a decoder weight has another shape": (
        "rae_dinov2",
        lambda folder: edit(folder / "decoder.pt", **{"decoder_pred.bias": torch.zeros(3)}),
        r"decoder_pred\.bias has shape \(3,\)",
    ),
    "positions of another grid": (
        "rae_dinov2",
        lambda folder: edit(folder / "decoder.pt", decoder_pos_embed=torch.zeros(1, 5, 24)),
        r"decoder_pos_embed has shape \(1, 5, 24\)",
    ),
    "an encoder weight is missing": (
        "rae_mae",
        lambda folder: edit(folder / "encoder" / "model.safetensors", **{"vit.embeddings.cls_token": None}),
        "encoder.*missing: embeddings.cls_token",
    ),
    "an encoder weight is left over": (
        "rae_siglip2",
        lambda folder: edit(folder / "encoder" / "model.safetensors", **{"vision_model.extra": torch.zeros(1)}),
        "encoder.*1 weight has no place: .*extra",
    ),
    "another encoder": (
        "rae_siglip2",
        lambda folder: edit_params(folder, encoder_cls="MAEwNorm"),
        "MAEwNorm needs an encoder of type 'vit_mae'",
    ),
    "an affine last norm": (
        "rae_dinov2",
        lambda folder: edit_params(folder, encoder_params={"dinov2_path": "encoder", "normalize": False}),
        "normalize: false is not supported",
    ),
    "grids that differ": (
        "rae_dinov2",
        lambda folder: edit_params(folder, encoder_input_size=23),
        "encoder_input_size 23 is not a multiple",
    ),
    "no stage 1": (
        "rae_dinov2",
        lambda folder: (folder / "configs" / "stage1" / "tiny.yaml").write_text("stage_2: {}"),
        "no stage_1.params",
    ),
    "no decoder configuration": (
        "rae_dinov2",
        lambda folder: (folder / "configs" / "decoder" / "tiny" / "config.json").unlink(),
        "there is no configs/decoder/tiny/config.json",
    ),
    "another activation": (
        "rae_dinov2",
        lambda folder: edit_json(folder / "configs" / "decoder" / "tiny" / "config.json", hidden_act="relu"),
        "hidden_act",
    ),
    "a training checkpoint": (
        "rae_dinov2",
        lambda folder: torch.save({"model": {"a": torch.zeros(1)}, "step": 3}, folder / "decoder.pt"),
        "extract_decoder.py",
    ),
    "a diffusers weight is missing": (
        "diffusers_mae",
        lambda folder: edit(
            folder / "diffusion_pytorch_model.safetensors",
            **{"decoder.decoder_norm.weight": None, "decoder.decoder_layers.0.attention.to_q.bias": None},
        ),
        r"2 weights are missing: decoder_layers\.0\.attention\.to_q\.bias, decoder_norm\.weight",
    ),
    "a diffusers weight is left over": (
        "diffusers_mae",
        lambda folder: edit(folder / "diffusion_pytorch_model.safetensors", quant_conv=torch.zeros(1)),
        "quant_conv",
    ),
    "a diffusers encoder weight is missing": (
        "diffusers_dinov2",
        lambda folder: edit(
            folder / "diffusion_pytorch_model.safetensors", **{"encoder.embeddings.register_tokens": None}
        ),
        "missing: embeddings.register_tokens",
    ),
    "a diffusers grid that is not 16 wide": (
        "diffusers_mae",
        lambda folder: edit_json(folder / "config.json", encoder_input_size=512),
        "no positions of its 32 x 32 tokens",
    ),
    "diffusers statistics of another shape": (
        "diffusers_mae",
        lambda folder: edit(folder / "diffusion_pytorch_model.safetensors", _latents_mean=torch.zeros(64, 8, 8)),
        r"_latents_mean.*\(64, 8, 8\)",
    ),
    "another model of diffusers": (
        "diffusers_mae",
        lambda folder: edit_json(folder / "config.json", _class_name="AutoencoderKL"),
        "AutoencoderKL",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_named_and_nothing_is_written(what, source, tmp_path):
    name, damage, message = BROKEN[what]
    folder, arguments, _ = source(name)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        convert(arguments, tmp_path / "runs" / "converted")
    assert sorted(tmp_path.iterdir()) == [folder]


def test_statistics_of_another_shape_are_refused(source, tmp_path):
    folder, arguments, _ = source("rae_dinov2")
    arguments += ["--statistics", str(folder / "stat.pt")]
    convert(arguments, tmp_path / "converted")
    edit(folder / "stat.pt", var=torch.ones(32, 4, 4))
    with pytest.raises(ValueError, match=r"'var' have shape \(32, 4, 4\).*\(32, 3, 3\)"):
        convert(arguments, tmp_path / "again")
    assert not (tmp_path / "again").exists()


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_are_not_unpickled(source, tmp_path):
    folder, arguments, _ = source("rae_dinov2")
    (folder / "decoder.pt").write_bytes(pickle.dumps(Payload(tmp_path / "unpickled"), 2))
    with pytest.raises(ValueError, match="decoder.pt.*not unpickled"):
        convert(arguments, tmp_path / "converted")
    assert sorted(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "one of the arguments --diffusers --rae_config is required"),
        (["--diffusers", "a", "--rae_config", "b.yaml"], "not allowed with argument"),
        (["--rae_config", "b.yaml"], "needs --decoder"),
        (["--diffusers", "a", "--decoder", "model.pt"], "go with --rae_config"),
    ],
)
def test_one_source_is_asked_for(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--output_dir", str(tmp_path / "converted")])
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(source, tmp_path, capsys):
    _, arguments, _ = source("rae_dinov2")
    (tmp_path / "converted").mkdir()
    with pytest.raises(SystemExit):
        convert(arguments, tmp_path / "converted")
    assert "exists" in capsys.readouterr().err
    assert not any((tmp_path / "converted").iterdir())


def test_what_reads_back_otherwise_is_not_kept(source, tmp_path, monkeypatch):
    folder, arguments, _ = source("rae_dinov2")
    save_pretrained = VQRAEModel.save_pretrained

    def save_another(model, target):
        with torch.no_grad():
            model.decoder.decoder_pred.bias += 1
            save_pretrained(model, target)
            model.decoder.decoder_pred.bias -= 1

    monkeypatch.setattr(VQRAEModel, "save_pretrained", save_another)
    with pytest.raises(RuntimeError, match="decoder_pred.bias"):
        convert(arguments, tmp_path / "converted")
    assert sorted(tmp_path.iterdir()) == [folder]


def test_help_from_anywhere(tmp_path):
    assert "--rae_config" in run(["-m", "convert.rae", "--help"], tmp_path)
