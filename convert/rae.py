#!/usr/bin/env python
"""Turns a RAE (Representation Autoencoder, arXiv 2510.11690) into a VQRAE, whose stage 1 then starts from its decoder.

    python -m convert.rae --diffusers nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08 --output_dir runs/rae_dinov2
    python -m convert.rae --rae_config RAE/configs/stage1/pretrained/DINOv2-B.yaml \\
        --decoder RAE/models/decoders/dinov2/wReg_base/ViTXL_n08/model.pt --output_dir runs/rae_dinov2

The first form reads what diffusers' AutoencoderRAE wrote. The second reads the files of github.com/bytetriper/RAE: a
configuration, the decoder's weights, and the encoder that the configuration names (DINOv2 with registers, MAE,
SigLIP 2), from a folder or the hub. Where there is a choice take the second: diffusers keeps no positions of the
decoder, and RAE's training script trains them.

Encoder, decoder, sizes and pixel statistics are the source's. With the quantizer left out,
`model.decode_latents(model.get_image_features(pixels).last_hidden_state)`, reconstructions are those of the RAE. RAE's
statistics of latents are checked and not needed: its `decode` undoes what its `encode` did with them, so its decoder
sees, as ours does, the features of the encoder as they are.

The quantizer is new. With --data its codes are k-means centroids of the features of those images. Without, they are
Gaussian, and tokens mean nothing before training, which fits the codes first. Then:

    python train_hf.py --model_name_or_path runs/rae_dinov2 --train_data my_images --output_dir runs/stage1

Every weight of the source must find its place: what is missing, left over or of another shape is named, and nothing is
written. Files are not unpickled (`weights_only`).
"""

import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from huggingface_hub import ModelCardData, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig

from configuration_simvq import VQRAEConfig
from decoding_simvq import sincos_positions
from eval.commands import CommandParser, ends_in_one_line
from eval.files import read_fields, write_folder_whole
from eval.options import present_device
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel, read_pixel_statistics
from reading.images import decode_image
from reading.models import loading
from reading.sources import load_images
from reading.wording import counted
from training.card import WIDGET, usage


# The names of our decoder's modules, as RAE and diffusers call them; all others are the same.
RAE_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "cls_token": "trainable_cls_token",
}
DIFFUSERS_NAMES = RAE_NAMES | {
    "attention.q_proj": "attention.to_q",
    "attention.k_proj": "attention.to_k",
    "attention.v_proj": "attention.to_v",
    "attention.o_proj": "attention.to_out.0",
}
POSITIONS = "decoder_pos_embed"

# Encoder classes of RAE, the model type of each, and the parameter that names its weights.
RAE_ENCODERS = {
    "Dinov2withNorm": ("dinov2_with_registers", "dinov2_path"),
    "MAEwNorm": ("vit_mae", "model_name"),
    "SigLIP2wNorm": ("siglip_vision_model", "model_name"),
}
# The configurations of the encoders in diffusers, which it does not write down; the rest is the default there as here.
DIFFUSERS_ENCODERS = {
    "dinov2": {"model_type": "dinov2_with_registers", "image_size": 518},
    "mae": {"model_type": "vit_mae", "image_size": 224},
    "siglip2": {"model_type": "siglip_vision_model", "image_size": 256},
}
# In the files of encoders that come with something else: SigLIP's text model, MAE's decoder.
NOT_THE_ENCODER = ("text_model.", "logit_scale", "logit_bias", "decoder.")

DECODER_SIZES = (
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_intermediate_size",
)


@dataclass
class Source:
    """A RAE as read from its files.

    Args:
        name: for the model card.
        config: fields of [`VQRAEConfig`].
        encoder: where its weights are, a folder or hub repository, or the weights.
        decoder: its weights, names as in `decoder_names`.
        decoder_names: see `RAE_NAMES`.
        statistics: of latents, by name.
    """

    name: str
    config: dict
    encoder: str | dict[str, torch.Tensor]
    decoder: dict[str, torch.Tensor]
    decoder_names: dict[str, str]
    statistics: dict[str, torch.Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors or PyTorch file; entries that are `None` are left out.

    Raises:
        ValueError: there is no such file; or it holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which is not unpickled: it can run code."
        ) from error
    if isinstance(tensors, dict):
        tensors = {name: value for name, value in tensors.items() if value is not None}
        if all(isinstance(value, torch.Tensor) for value in tensors.values()):
            return tensors
    raise ValueError(
        f"{path} does not hold named tensors only. For a training checkpoint of RAE, run its src/extract_decoder.py "
        "first."
    )


def require(fields: dict, names: tuple[str, ...], where: str | Path) -> None:
    """Raises a ValueError that names what is missing."""
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")


def read_diffusers(name_or_path: str) -> Source:
    """What `AutoencoderRAE.save_pretrained` wrote.

    Args:
        name_or_path: a folder, or a repository of the hub, which is downloaded.
    """
    file = "diffusion_pytorch_model.safetensors"
    folder = Path(name_or_path)
    if not folder.is_dir():
        print(f"Downloading {name_or_path} from the hub.", flush=True)
        with loading(name_or_path):
            folder = Path(snapshot_download(name_or_path, allow_patterns=["config.json", file]))
    print(f"Reading {folder / file}.", flush=True)
    weights = read_tensors(folder / file)
    rae = read_fields(folder / "config.json")
    if rae.get("_class_name") != "AutoencoderRAE":
        raise ValueError(f"{folder / 'config.json'} is that of {rae.get('_class_name')}, not of AutoencoderRAE.")
    names = ("encoder_hidden_size", "encoder_num_hidden_layers", "encoder_input_size", "encoder_patch_size")
    require(rae, ("encoder_type", *names, "patch_size", *DECODER_SIZES), folder / "config.json")
    if rae["encoder_type"] not in DIFFUSERS_ENCODERS:
        raise ValueError(f"encoder_type must be one of {sorted(DIFFUSERS_ENCODERS)}, got '{rae['encoder_type']}'.")
    require(weights, ("encoder_mean", "encoder_std"), folder / file)
    width, patch = rae["encoder_hidden_size"], rae["encoder_patch_size"]
    config = {
        "encoder_config": {
            **DIFFUSERS_ENCODERS[rae["encoder_type"]],
            "hidden_size": width,
            "num_hidden_layers": rae["encoder_num_hidden_layers"],
            "num_attention_heads": width // 64,
            "patch_size": patch,
        },
        "encoder_input_size": rae["encoder_input_size"],
        "decoder_patch_size": rae["patch_size"],
        "image_size": rae["encoder_input_size"] // patch * rae["patch_size"],
        "num_channels": rae.get("num_channels", 3),
        **{name: rae[name] for name in DECODER_SIZES},
        "decoder_layer_norm_eps": 1e-12,
        "noise_tau": rae.get("noise_tau", 0.0),
        "image_mean": weights.pop("encoder_mean").flatten().tolist(),
        "image_std": weights.pop("encoder_std").flatten().tolist(),
    }
    statistics = {name: weights.pop(name) for name in ("_latents_mean", "_latents_std") if name in weights}
    encoder, decoder = (
        {name.removeprefix(part): value for name, value in weights.items() if name.startswith(part)}
        for part in ("encoder.", "decoder.")
    )
    left_over = [name for name in weights if not name.startswith(("encoder.", "decoder."))]
    if left_over:
        raise ValueError(
            f"{folder / file} has {counted(len(left_over), 'weight that is', 'weights that are')} not a RAE's: "
            f"{left_over[:5]}."
        )
    grid = rae["encoder_input_size"] // patch
    if POSITIONS not in decoder and grid != 16:
        raise ValueError(
            f"{folder / file} has no positions of its {grid} x {grid} tokens. diffusers computes them as if every grid "
            "were 16 wide, RAE does not, and the file does not tell for which the decoder was trained. Convert RAE's "
            "own files instead: --rae_config and --decoder."
        )
    name = folder.name if Path(name_or_path).is_dir() else name_or_path
    return Source(name, config, encoder, decoder, DIFFUSERS_NAMES, statistics)


def find_decoder_config(name: str, config_file: Path) -> Path:
    """RAE names the decoder's configuration from the root of its repository, where its scripts run: looked for in the
    working directory and upwards from the configuration."""
    for folder in (Path(), *config_file.resolve().parents):
        if (folder / name / "config.json").is_file():
            return folder / name / "config.json"
    raise ValueError(
        f"decoder_config_path of {config_file} is {name}, but there is no {name}/config.json here or in a folder above "
        "that file: keep the configuration inside a clone of RAE."
    )


def read_rae(config_file: str, decoder_file: str, statistics_file: str | None, encoder: str | None) -> Source:
    """The files of RAE itself.

    Args:
        config_file: configs/stage1/pretrained/*.yaml.
        decoder_file: state dict of the decoder.
        statistics_file: mean and variance of the latents.
        encoder: a folder or hub repository, instead of the one that the configuration names.
    """
    params = (read_fields(Path(config_file)).get("stage_1") or {}).get("params")
    if not params:
        raise ValueError(f"{config_file} has no stage_1.params: it is not a stage 1 configuration of RAE.")
    require(params, ("encoder_cls", "encoder_config_path", "encoder_params", "decoder_config_path"), config_file)
    if params["encoder_cls"] not in RAE_ENCODERS:
        raise ValueError(f"encoder_cls must be one of {sorted(RAE_ENCODERS)}, got '{params['encoder_cls']}'.")
    model_type, parameter = RAE_ENCODERS[params["encoder_cls"]]
    if params["encoder_params"].get("normalize") is False:
        raise ValueError("normalize: false is not supported: the last norm of our encoders has no affine part.")
    named = {params["encoder_config_path"], params["encoder_params"].get(parameter)}
    if encoder is None and len(named) > 1:
        raise ValueError(f"{config_file} names the encoders {sorted(map(str, named))}: choose one with --encoder.")
    encoder = encoder or params["encoder_config_path"]

    decoder_config_file = find_decoder_config(params["decoder_config_path"], Path(config_file))
    decoder_config = read_fields(decoder_config_file)
    require(decoder_config, DECODER_SIZES, decoder_config_file)
    if decoder_config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act of {decoder_config_file} is {decoder_config['hidden_act']}; ours is gelu.")

    print(f"Reading the configuration of {encoder} (from the hub if it is no folder).", flush=True)
    with loading(encoder):
        encoder_config = AutoConfig.from_pretrained(encoder)
    encoder_config = getattr(encoder_config, "vision_config", encoder_config)
    if encoder_config.model_type != model_type:
        raise ValueError(
            f"{params['encoder_cls']} needs an encoder of type '{model_type}', but {encoder} is of type "
            f"'{encoder_config.model_type}'."
        )
    with loading(encoder):
        pixel_statistics, _ = read_pixel_statistics(encoder, model_type)
    input_size, patch = params.get("encoder_input_size", 224), params.get("decoder_patch_size", 16)
    config = {
        "encoder_config": encoder_config,
        "encoder_input_size": input_size,
        "decoder_patch_size": patch,
        "image_size": input_size // encoder_config.patch_size * patch,
        "num_channels": decoder_config.get("num_channels", 3),
        **{name: decoder_config[name] for name in DECODER_SIZES},
        "decoder_layer_norm_eps": decoder_config.get("layer_norm_eps", 1e-12),
        "noise_tau": params.get("noise_tau", 0.8),
        **pixel_statistics,
    }
    print(f"Reading {decoder_file}.", flush=True)
    decoder = read_tensors(decoder_file)
    statistics = read_tensors(statistics_file) if statistics_file else {}
    if statistics and not statistics.keys() <= {"mean", "var"}:
        raise ValueError(f"{statistics_file} holds {sorted(statistics)}, expected mean and var.")
    name = f"{Path(config_file).stem}, {Path(decoder_file).name}"
    return Source(name, config, encoder, decoder, RAE_NAMES, statistics)


# ---------------------------------------------------------------------------------------------------------------------
# Converting
# ---------------------------------------------------------------------------------------------------------------------


def check_statistics(statistics: dict[str, torch.Tensor], config: VQRAEConfig) -> None:
    """RAE normalises latents at the end of `encode` and undoes it at the start of `decode`, so reconstructions do not
    depend on the statistics. That they fit tells that the files belong together.

    Raises:
        ValueError: they do not.
    """
    latents = (1, config.encoder_config.hidden_size, config.grid_size, config.grid_size)
    for name, value in statistics.items():
        try:
            fits = torch.broadcast_shapes(value.shape, latents) == latents
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"The statistics '{name}' have shape {tuple(value.shape)}, but the latents of this RAE have "
                f"{latents[1:]}: they belong to another one."
            )
    if statistics:
        print("Statistics of the latents fit and are not needed: RAE's decode undoes what its encode does with them.")


def load_encoder(model: VQRAEModel, encoder: str | dict[str, torch.Tensor]) -> None:
    """Copies an encoder's weights. transformers reads them, because it knows the names of its former versions.

    Raises:
        ValueError: weights are missing, or some are not explained.
    """
    name, weights = (encoder, None) if isinstance(encoder, str) else (None, encoder)
    where = name or "the encoder of the source"
    print(f"Loading {where} ({model.config.encoder_config.model_type}).", flush=True)
    pretrained, info = type(model.encoder).from_pretrained(
        name,
        state_dict=weights,
        config=model.config.encoder_config,
        dtype=torch.float32,
        output_loading_info=True,
    )
    own = model.encoder.state_dict()
    unexplained = {key for key in info["unexpected_keys"] if not key.startswith(NOT_THE_ENCODER)}
    raise_unless_complete(where, own.keys() & info["missing_keys"], unexplained)
    weights = pretrained.state_dict()
    model.encoder.load_state_dict({key: weights[key] for key in own})


def raise_unless_complete(where: str, missing: set[str], unexplained: set[str]) -> None:
    problems = [
        f"{counted(len(names), one, many)}: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
        for one, many, names in (
            ("weight is missing", "weights are missing", missing),
            ("weight has no place", "weights have no place", unexplained),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}.")


def position_offsets(positions: torch.Tensor | None, config: VQRAEConfig) -> torch.Tensor | None:
    """How far the source's positions are from the fixed ones, cls token first, (1 + h * w, width). `None` if they are
    the fixed ones. They start as these, without gradients, but RAE's training script calls
    `decoder.requires_grad_(True)` and gives all parameters to the optimizer.

    Raises:
        ValueError: of another shape.
    """
    if positions is None:
        return None
    grid, width = config.grid_size, config.decoder_hidden_size
    check_shape(POSITIONS, positions, (1, 1 + grid * grid, width))
    fixed = sincos_positions(grid, grid, width, torch.device("cpu"))
    offsets = positions[0].float() - torch.cat([torch.zeros(1, width), fixed])
    distance = offsets.abs().max().item()
    trained = distance > 1e-5
    what = "were trained: learned positions hold the difference" if trained else "are the fixed ones"
    print(f"The decoder's positions {what} (at most {distance:.2g}).")
    return offsets if trained else None


def check_shape(name: str, tensor: torch.Tensor, needed: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(needed):
        raise ValueError(
            f"The decoder's {name} has shape {tuple(tensor.shape)}, but the configuration says {tuple(needed)}."
        )


def load_decoder(model: VQRAEModel, source: Source, offsets: torch.Tensor | None) -> None:
    """Copies the decoder's weights.

    Raises:
        ValueError: weights are missing, not explained, or of another shape.
    """
    own = {name: value for name, value in model.decoder.state_dict().items() if name != "position_offsets"}
    theirs = {}
    for name in own:
        theirs[name] = name
        for ours, other in source.decoder_names.items():
            theirs[name] = theirs[name].replace(ours, other)
    given = source.decoder.keys() - {POSITIONS}
    needed = set(theirs.values())
    raise_unless_complete("The decoder", needed - given, given - needed)
    weights = {}
    for name, value in own.items():
        weights[name] = source.decoder[theirs[name]].float()
        check_shape(theirs[name], weights[name], value.shape)
    if offsets is not None:  # the position of the cls token goes into the token
        weights["cls_token"] = weights["cls_token"] + offsets[:1]
        grid = model.config.grid_size
        weights["position_offsets"] = offsets[1:].T.reshape(1, -1, grid, grid)
    model.decoder.load_state_dict(weights)


def build(source: Source, codebook_size: int, codebook_dim: int | None) -> VQRAEModel:
    """A tokenizer with the weights of the source and a Gaussian codebook."""
    config = VQRAEConfig(
        **source.config,
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        # train_hf.py does the same with a new model
        codebook_init="gaussian" if codebook_dim else "kmeans",
    )
    check_statistics(source.statistics, config)
    offsets = position_offsets(source.decoder.get(POSITIONS), config)
    config.decoder_learned_positions = offsets is not None
    torch.manual_seed(0)
    model = VQRAEModel(config).eval()
    load_encoder(model, source.encoder)
    load_decoder(model, source, offsets)
    return model


def image_batches(images: Dataset, processor: VQRAEImageProcessor, batch_size: int = 16) -> Iterator[torch.Tensor]:
    """Pixels (B, 3, H, W) of a column `image`."""
    for start in range(0, len(images), batch_size):
        decoded = [decode_image(record) for record in images[start : start + batch_size]["image"]]
        yield processor(decoded, return_tensors="pt").pixel_values


def fit_codebook(model: VQRAEModel, data: str, device: str) -> None:
    """k-means on the features of as many images as the codes need, drawn at random."""
    images = load_images(data)
    needed = math.ceil(32 * model.config.codebook_size / model.config.grid_size**2)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:needed].tolist()
    print(
        f"Fitting {model.config.codebook_size:,} codes to {len(order):,} of {counted(len(images), 'image')}.",
        flush=True,
    )
    processor = VQRAEImageProcessor.for_image_size(model.config.image_size)
    model.to(device).initialize_codebook(image_batches(images.select(order), processor))
    model.cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------

CARD = """
# {name}

A discrete image tokenizer ([VQRAE](https://huggingface.co/papers/2511.23386) with
[SimVQ](https://huggingface.co/papers/2411.02038)) for {size} px images, made from the
[RAE](https://huggingface.co/papers/2510.11690) `{source}`: encoder ({encoder}) and decoder are its own, the
{codes:,} codes of width {width} are new.

{usage}

{state} Nothing was trained.
"""
FITTED = "The codes are the k-means centroids of {latents:,} features of images."
GAUSSIAN = "The codes are Gaussian and know nothing of the features: tokens mean nothing before training."
TO_BE_FITTED = f"{GAUSSIAN} `train_hf.py` fits them to the training images before its first step."


def codebook_state(config: VQRAEConfig) -> str:
    if config.codebook_init == "gaussian":
        return GAUSSIAN
    latents = config.codebook_init_latents
    return TO_BE_FITTED if latents is None else FITTED.format(latents=latents)


def model_card(model: VQRAEModel, name: str, source: str) -> str:
    """The text of README.md."""
    config = model.config
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["vqrae", "simvq", "rae", "image-tokenizer"],
        widget=WIDGET,
    )
    text = CARD.format(
        name=name,
        usage=usage(name, config),
        size=config.image_size,
        source=source,
        encoder=f"{config.encoder_config.model_type}, width {config.encoder_config.hidden_size}",
        codes=config.codebook_size,
        width=config.latent_size,
        state=codebook_state(config),
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


@torch.no_grad()
def check_saved(model: VQRAEModel, folder: Path) -> None:
    """Raises a RuntimeError if what is read back has other weights, tokens or reconstructions."""
    loaded = VQRAEModel.from_pretrained(folder).eval()
    ours, theirs = model.state_dict(), loaded.state_dict()
    differ = ours.keys() ^ theirs.keys() or {name for name in ours if not torch.equal(ours[name], theirs[name])}
    pixels = torch.rand(1, 3, model.config.image_size, model.config.image_size)
    outputs = [
        (
            m.get_image_tokens(pixels),
            m.decode_latents(m.get_image_features(pixels).last_hidden_state).decoded_pixel_values,
        )
        for m in (model, loaded)
    ]
    if differ or not all(torch.equal(a, b) for a, b in zip(*outputs)):
        raise RuntimeError(f"What was written is not what was converted; weights that differ: {sorted(differ)[:5]}.")


def save(model: VQRAEModel, source: str, output: Path) -> None:
    """Model, processor and card, read back and compared before the folder gets its name."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        VQRAEImageProcessor.for_image_size(model.config.image_size).save_pretrained(folder)
        (folder / "README.md").write_text(model_card(model, output.name, source))
        check_saved(model, folder)

    write_folder_whole(output, write)


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--diffusers", help="AutoencoderRAE of diffusers: a folder or a hub repository.")
    sources.add_argument("--rae_config", help="Stage 1 configuration of RAE, a .yaml file inside a clone of it.")
    parser.add_argument("--decoder", help="With --rae_config: the decoder's state dict, .pt or .safetensors.")
    parser.add_argument("--statistics", help="With --rae_config: stat.pt, the statistics of latents, to be checked.")
    parser.add_argument("--encoder", help="With --rae_config: another folder or repository of the same encoder.")
    parser.add_argument("--output_dir", required=True, help="A new folder for model, image processor and card.")
    parser.add_argument("--codebook_size", type=int, default=16384, help="Number of codes (default: 16384).")
    parser.add_argument(
        "--codebook_dim", type=int, help="Width of the codes behind a new learnable projection (default: none)."
    )
    parser.add_argument("--data", help="Images to fit the codes to, see docs/data.md.")
    parser.add_argument(
        "--device",
        type=present_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Where the codes are fitted (default: cuda where there is one).",
    )
    args = parser.parse_args(arguments)
    if args.rae_config and not args.decoder:
        parser.error("--rae_config needs --decoder")
    if args.diffusers and (args.decoder or args.statistics or args.encoder):
        parser.error("--decoder, --statistics and --encoder go with --rae_config; --diffusers has them all")
    output = Path(args.output_dir)
    if output.exists():
        parser.error(f"--output_dir {output} exists: remove it or choose another")

    transformers.logging.set_verbosity_error()  # what it says about missing weights is checked here
    if args.diffusers:
        source = read_diffusers(args.diffusers)
    else:
        source = read_rae(args.rae_config, args.decoder, args.statistics, args.encoder)
    model = build(source, args.codebook_size, args.codebook_dim)
    if args.data:
        fit_codebook(model, args.data, args.device)
    print(codebook_state(model.config), flush=True)
    save(model, source.name, output)
    config = model.config
    print(f"{output}: {config.image_size} px, {config.grid_size} x {config.grid_size} tokens, read back and compared.")
    print(f"Next: python train_hf.py --model_name_or_path {output} --train_data my_images --output_dir runs/stage1")


if __name__ == "__main__":
    with ends_in_one_line():
        main()
