"""Loading a trained tokenizer of either kind by the classes of this repository, which AutoModel takes in place of the
code beside a checkpoint: that is not run, unless it is another kind of model and that is asked for."""

import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import fields

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from configuration_simvq import VQRAEConfig
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import ImageTokenizer, VQRAEModel
from modeling_simvq_gan import SimVQGANModel
from reading.sources import NAME_ON_HUB
from reading.wording import did_you_mean


MODELS = {model.config_class.model_type: model for model in (VQRAEModel, SimVQGANModel)}


@contextmanager
def loading(name_or_path: str):
    """Around what a library loads: its errors become a ValueError that names what was to be loaded, in one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(cannot_be_loaded(name_or_path, error)) from error


def cannot_be_loaded(name_or_path: str, error: Exception) -> str:
    """What is wrong with a model that a library could not load, in one line. Transformers takes every path that is not
    there for a name of the hub, and says that the network is at fault."""
    said = " ".join(str(error).split())
    if os.path.exists(name_or_path) or not isinstance(error, (OSError, HFValidationError)):
        return f"{name_or_path} cannot be loaded: {said}"
    if not NAME_ON_HUB.fullmatch(name_or_path):
        return f"There is no folder {name_or_path}: check the path of the model."
    return (
        f"There is no folder {name_or_path} here, and no model of this name could be had from the hub ({said}): check "
        "the path, or the name and the connection."
    )


def exact_float32() -> None:
    """float32 is not TF32 from here on, to which NVIDIA's convolutions round their inputs unless told not to."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def load_any(
    name_or_path: str, dtype: torch.dtype, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedModel:
    """A tokenizer of either kind, or one of others with their methods, in eval mode.

    Args:
        name_or_path: folder or hub repository.
        dtype: of its weights, whatever the checkpoint holds.
        trust_remote_code: run the modeling code that comes with a model of another kind.
        revision: branch, tag or commit of a hub repository.

    Raises:
        ValueError: it cannot be loaded so, or is no tokenizer.
    """
    options = {"trust_remote_code": trust_remote_code, "revision": revision}
    with loading(name_or_path):
        model = AutoModel.from_pretrained(name_or_path, dtype=dtype, **options).eval()
    if not hasattr(model.config, "codebook_size"):
        kind = type(model).__name__
        raise ValueError(f"{name_or_path} is a {kind}, not a tokenizer: its configuration has no codebook_size.")
    return model


def check_fields(config_class: type[PreTrainedConfig], config: dict, whose: str) -> None:
    """Transformers would keep a field that a configuration does not have, and nothing would read it.

    Raises:
        ValueError: there is one.
    """
    known = [known.name for known in fields(config_class)]
    if unknown := sorted(config.keys() - set(known)):
        meant = did_you_mean(unknown[0], known) if len(unknown) == 1 else ""
        otherwise = ": pass other fields as --model_config, or {} for none of those that a recipe has."
        raise ValueError(
            f"{whose} has a {config_class.__name__}, which has no {', '.join(unknown)}{meant or otherwise}"
        )


def load_pretrained(name_or_path: str, config: dict, hub_kwargs: dict | None = None) -> ImageTokenizer:
    """A trained tokenizer of either kind, with some fields of its configuration changed.

    Args:
        name_or_path: a folder or a hub repository.
        config: the fields.
        hub_kwargs: for the hub: `revision`, `token`, ...

    Raises:
        ValueError: another kind of model, fields that its configuration does not have, or what cannot be loaded.
    """
    hub_kwargs = hub_kwargs or {}
    with loading(name_or_path):
        model_type = PreTrainedConfig.get_config_dict(name_or_path, **hub_kwargs)[0].get("model_type")
    if model_type not in MODELS:
        raise ValueError(f"{name_or_path} is a model of type '{model_type}', expected one of {', '.join(MODELS)}.")
    config_class = MODELS[model_type].config_class
    check_fields(config_class, config, name_or_path)
    if "image_size" in config and model_type == VQRAEConfig.model_type:  # the encoder sees the grid that it gives
        saved = VQRAEConfig.from_pretrained(name_or_path, **hub_kwargs)
        grid = config["image_size"] // config.get("decoder_patch_size", saved.decoder_patch_size)
        config = {"encoder_input_size": grid * saved.encoder_patch_size, **config}
    with loading(name_or_path):
        model = MODELS[model_type].from_pretrained(name_or_path, dtype=torch.float32, **hub_kwargs, **config)
    model.config.validate_architecture()  # transformers does it when the model is saved
    return model


def load_processor(name_or_path: str | None, size: int, hub_kwargs: dict | None = None) -> VQRAEImageProcessor:
    """The processor for images of `size` pixels. A model to go on with keeps the filter with which it resizes.

    Args:
        name_or_path: of that model, a folder or a hub repository; `None`: there is none.
        size: of images, in pixels.
        hub_kwargs: for the hub: `revision`, `token`, ...
    """
    processor = VQRAEImageProcessor.for_image_size(size)
    if name_or_path:
        try:
            processor.resample = VQRAEImageProcessor.from_pretrained(name_or_path, **(hub_kwargs or {})).resample
        except OSError:  # it was saved without a processor
            pass
    return processor


# Which tokens ---------------------------------------------------------------------------------------------------------

# fields of a configuration, beside the weights, that decide which tokens an image has
SEEN = (
    "encoder_layers",
    "pixel_weight",
    "encoder_input_size",
    "decoder_patch_size",
    "image_mean",
    "image_std",
)


def tokenizer_hash(model: ImageTokenizer) -> str:
    """SHA-256 of what decides tokens: the encoder, the projection, the quantizer and the fields `SEEN`, in hexadecimal.

    Weights are taken in fp32, so a checkpoint that is stored in fp16 has the same hash as what it is loaded into. What
    paints (`project_out`, decoder) has no part in it: tokens stay those of a model whose decoder is trained further.
    """
    digest = hashlib.sha256(json.dumps([getattr(model.config, name, None) for name in SEEN]).encode())
    for part in (model.encoder, model.project_in, model.quantizer):
        for tensor in part.state_dict().values():
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
