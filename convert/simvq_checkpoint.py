#!/usr/bin/env python
"""Converts an image checkpoint of the SimVQ reference (github.com/youngsheen/SimVQ) to a SimVQGANModel.

    python -m convert.simvq_checkpoint --checkpoint "vq_log/simvq_1k/epoch=49-step=250250.ckpt" \\
        --config vq_log/simvq_1k/size128/config.yaml --output_dir simvq-1k

The authors' checkpoints with 1,024 to 262,144 codes are in huggingface.co/youngsheen/SimVQ, the config.yaml of each
training run beside them. They are PyTorch Lightning pickles; this script reads tensors and plain values from them and
executes nothing, neither from the pickle nor what the YAML names.

--output_dir gets model.safetensors, config.json, preprocessor_config.json, the modeling code and a model card:

    model = AutoModel.from_pretrained("simvq-1k", trust_remote_code=True).eval()
    python -m eval.reconstruction --model_name_or_path simvq-1k --data my_images --protocol simvq-128 --output_dir out
    python train_hf.py configs/simvq_128.json --model_name_or_path simvq-1k --model_config {} --train_data my_images

Every weight of the model must be in the checkpoint in its shape, and every key of the checkpoint must have a known use;
LPIPS and the discriminator are left behind. Before the folder gets its name the model is loaded from it and compared.
"""

import pickle
from collections.abc import Collection
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from huggingface_hub.errors import StrictDataclassError
from transformers.image_utils import PILImageResampling

from configuration_simvq_gan import SimVQGANConfig
from eval.commands import CommandParser, ends_in_one_line
from eval.files import read_fields, sha256_of_files, write_folder_whole
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq_gan import SimVQGANModel
from reading.wording import counted
from training.card import WIDGET, usage


MODEL, QUANTIZER = "taming.models.vq.VQModel", "taming.modules.vqvae.quantize.SimVQ"

# names in the YAML -> names in SimVQGANConfig, and what the reference does not read or what must agree
NETWORK_FIELDS = {
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "num_res_blocks": "num_res_blocks",
    "z_channels": "latent_channels",
    "resolution": "image_size",
    "in_channels": "num_channels",
}
QUANTIZER_FIELDS = {"n_e": "codebook_size", "beta": "commitment_cost", "legacy": "legacy"}
OTHER_FIELDS = {"double_z", "out_ch", "e_dim", "remap", "unknown_index", "sane_index_shape"}

LEFT_BEHIND = {
    "loss.perceptual_loss.": "LPIPS",
    "loss.discriminator.": "discriminator",
    "model_ema.loss": "averages of the discriminator",
    "model_ema.decay": "decay of the averages",
    "model_ema.num_updates": "steps of the averages",
}

CARD = """
# {name}

The image tokenizer of [SimVQ](https://huggingface.co/papers/2411.02038) with {codes:,} codes of width {width}, for
{size} px images: a convolutional encoder and decoder, one token for each {patch} x {patch} pixels.

{usage}

## Source

Converted from `{checkpoint}` ({weights}; SHA-256 `{digest}`), a checkpoint of
[github.com/youngsheen/SimVQ](https://github.com/youngsheen/SimVQ). The authors publish theirs, and the code, under the
MIT license: [huggingface.co/youngsheen/SimVQ](https://huggingface.co/youngsheen/SimVQ).

Pixels are in [0, 1] here, and in [-1, 1] there. Nothing was measured on images in the conversion.
"""
WEIGHTS = {"ema": "the moving average of the weights", "raw": "the weights of the last step, not their moving average"}


def some(names: Collection[str], count: int = 20) -> str:
    """Names for a message, the first ones of many."""
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def read_config(path: Path) -> SimVQGANConfig:
    """The model that a config.yaml of the reference describes. What it names is compared, never imported.

    Raises:
        ValueError: it describes another model, or has options that are not known here, or lacks some.
    """
    try:
        model = read_fields(path)["model"]
        network, quantizer = model["init_args"]["ddconfig"], model["init_args"]["quantconfig"]
        classes = {
            "model.class_path": (model["class_path"], MODEL),
            "quantconfig.target": (quantizer["target"], QUANTIZER),
        }
        # defaults of the reference's classes
        network = {"ch_mult": [1, 2, 2, 4], **network}
        quantizer = {"beta": 0.25, "legacy": True, **quantizer["params"]}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no config.yaml of an image tokenizer of the SimVQ reference (model.class_path, "
            f"model.init_args.ddconfig, model.init_args.quantconfig): {error}."
        ) from error
    for name, (given, expected) in classes.items():
        if given != expected:
            raise ValueError(f"{path}: {name} is {given}; only {expected} can be converted.")
    options = network | quantizer
    missing = (NETWORK_FIELDS | QUANTIZER_FIELDS).keys() - options.keys()
    unknown = options.keys() - NETWORK_FIELDS.keys() - QUANTIZER_FIELDS.keys() - OTHER_FIELDS
    if missing or unknown:
        raise ValueError(
            f"{path}: options missing: {some(missing) or 'none'}; not known here: {some(unknown) or 'none'}."
        )
    for name, other in (("out_ch", "in_channels"), ("e_dim", "z_channels")):
        if options.get(name) != options[other]:
            raise ValueError(f"{path}: {name} is {options.get(name)}, {other} is {options[other]}; they must agree.")
    if options.get("remap") is not None:
        raise ValueError(f"{path}: remap is {options['remap']}; remapped indices cannot be converted.")
    try:
        return SimVQGANConfig(**{own: options[name] for name, own in (NETWORK_FIELDS | QUANTIZER_FIELDS).items()})
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a Lightning checkpoint, read without executing anything in it.

    Raises:
        ValueError: it wants more than tensors and plain values, is damaged, or has no state dict.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # whatever a damaged file brings up
            foreign = []
        if not foreign:
            raise ValueError(f"{path} is damaged, or no PyTorch checkpoint: is the download complete?") from error
        raise ValueError(
            f"{path} wants Python objects beyond tensors and plain values ({some(foreign)}). Creating them could "
            "execute anything, so they are not created. Whoever trusts the file, and has installed what they come "
            "from, can save the tensors alone, and convert that:\n"
            "    import torch\n"
            f"    checkpoint = torch.load({str(path)!r}, map_location='cpu', weights_only=False)\n"
            "    torch.save({'state_dict': checkpoint['state_dict']}, 'tensors.ckpt')"
        ) from error
    state_dict = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} is no Lightning checkpoint: it holds no 'state_dict' of tensors.")
    return state_dict


def take_weights(state_dict: dict[str, torch.Tensor], model: SimVQGANModel, ema: bool) -> dict[str, torch.Tensor]:
    """The model's tensors under its own names.

    The reference's names are the model's with `quantize` for `quantizer`. Its averages (LitEma, taming/modules/ema.py)
    are `model_ema.` and the name of the parameter without its dots; the codebook is frozen and has none.

    Args:
        state_dict: as the checkpoint holds it.
        model: on which the names and shapes are checked.
        ema: take the averages.

    Raises:
        ValueError: a weight is missing or has another shape, or a key has no known use.
    """
    raw = {own: own.replace("quantizer.", "quantize.", 1) for own in model.state_dict()}
    averages = {own: "model_ema." + raw[own].replace(".", "") for own, _ in model.named_parameters()}
    if ema and state_dict.keys().isdisjoint(averages.values()):
        raise ValueError("The checkpoint has no averaged weights (model_ema.*): pass --weights raw.")
    known = {*raw.values(), *averages.values()}
    missing = (known if ema else set(raw.values())) - state_dict.keys()
    unexplained = {key for key in state_dict.keys() - known if not key.startswith(tuple(LEFT_BEHIND))}
    if missing or unexplained:
        raise ValueError(
            "Checkpoint and --config do not describe the same model. "
            f"Weights missing ({len(missing)}): {some(missing) or '-'}. "
            f"Keys without a known use ({len(unexplained)}): {some(unexplained) or '-'}."
        )
    source = raw | averages if ema else raw
    weights = {own: state_dict[source[own]] for own in raw}
    wrong = [
        f"{source[own]} is {tuple(weights[own].shape)}, expected {tuple(tensor.shape)}"
        for own, tensor in model.state_dict().items()
        if weights[own].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(
            f"{counted(len(wrong), 'weight has', 'weights have')} another shape than --config says: {some(wrong, 5)}."
        )
    for prefix, what in LEFT_BEHIND.items():
        if count := sum(key.startswith(prefix) for key in state_dict):
            print(f"  left behind: {count:3} of {prefix}* ({what})")
    print(f"  taken: {len(weights)} tensors, {sum(tensor.numel() for tensor in weights.values()):,} numbers")
    return weights


@torch.no_grad()
def check(model: SimVQGANModel, folder: Path) -> float:
    """Loads the model from a folder and compares it with the one in memory on two images of noise.

    Returns:
        The greatest difference of a reconstructed pixel.

    Raises:
        RuntimeError: other tokens, or pixels that differ by more than 1e-5.
    """
    size = model.config.image_size
    pixels = torch.rand(2, model.config.num_channels, size, size, generator=torch.Generator().manual_seed(0))
    loaded = SimVQGANModel.from_pretrained(folder)
    expected, output = model(pixels, return_loss=False), loaded(pixels, return_loss=False)
    difference = (expected.decoded_pixel_values - output.decoded_pixel_values).abs().max().item()
    if not torch.equal(expected.image_tokens, output.image_tokens) or not difference <= 1e-5:
        raise RuntimeError(f"The model loaded from {folder} is another one: its pixels differ by {difference:g}.")
    return difference


def model_card(config: SimVQGANConfig, name: str, checkpoint: Path, weights: str, license: str | None) -> str:
    """The text of README.md."""
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["simvq_gan", "simvq", "image-tokenizer"],
        widget=WIDGET,
    )
    text = CARD.format(
        name=name,
        usage=usage(name, config),
        codes=config.codebook_size,
        width=config.latent_size,
        size=config.image_size,
        patch=config.decoder_patch_size,
        checkpoint=checkpoint.name,
        digest=sha256_of_files(checkpoint),
        weights=WEIGHTS[weights],
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def convert(checkpoint: Path, config: Path, output_dir: Path, weights: str = "ema", license: str | None = None) -> None:
    """Converts a checkpoint; the folder is there whole or not at all.

    Args:
        checkpoint: the `.ckpt` file.
        config: the config.yaml of its run.
        output_dir: must not exist, or be empty.
        weights: "ema" for the averages, with which the reference evaluates, or "raw".
        license: of the weights, for the card.

    Raises:
        ValueError: something about the inputs, which is named.
        RuntimeError: what was written does not load as what it was; nothing of it is left.
    """
    output_dir = output_dir.resolve()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists and is not empty: choose another --output_dir, or remove it.")
    print(f"Reading {config}.")
    model = SimVQGANModel(read_config(config)).eval()
    print(f"  {model.config.codebook_size:,} codes of width {model.config.latent_size}, {model.config.image_size} px")
    print(f"Reading {checkpoint}.", flush=True)
    model.load_state_dict(take_weights(read_state_dict(checkpoint), model, weights == "ema"))

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor = VQRAEImageProcessor.for_image_size(model.config.image_size)
        processor.resample = PILImageResampling.BILINEAR  # as in the reference's evaluation
        processor.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(model.config, output_dir.name, checkpoint, weights, license))
        print("Loading what was written, and comparing.", flush=True)
        print(f"  same tokens for two images of noise, pixels differ by {check(model, folder):g} at most")

    print(f"Writing {output_dir}.", flush=True)
    write_folder_whole(output_dir, write)
    print(f"Model, image processor and model card: {output_dir}")


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="The .ckpt file of the reference.")
    parser.add_argument("--config", type=Path, required=True, help="The config.yaml of the run that wrote it.")
    parser.add_argument("--output_dir", type=Path, required=True, help="A new folder for the converted model.")
    parser.add_argument(
        "--weights",
        choices=list(WEIGHTS),
        default="ema",
        help="ema: the moving average of the weights, which the reference evaluates (default); raw: those of the last "
        "step, for a checkpoint without averages.",
    )
    parser.add_argument("--license", help="Licence of the weights, for the card; that of the published ones is mit.")
    args = parser.parse_args()
    for file in (args.checkpoint, args.config):
        if not file.is_file():
            parser.error(f"{file} is no file.")
    convert(args.checkpoint, args.config, args.output_dir, args.weights, args.license)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
