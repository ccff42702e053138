"""Loading a trained tokenizer of either kind by the classes of this repository: code that comes with a model is not
run, unless it is another kind of model and that is asked for."""

from contextlib import contextmanager
from dataclasses import fields

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from configuration_simvq import VQRAEConfig
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import ImageTokenizer, VQRAEModel
from modeling_simvq_gan import SimVQGANModel


MODELS = {model.config_class.model_type: model for model in (VQRAEModel, SimVQGANModel)}


def load_pretrained(name_or_path: str, config: dict) -> ImageTokenizer:
    """A trained tokenizer of either kind, with some fields of its configuration changed.

    Raises:
        ValueError: another kind of model, or fields that its configuration does not have.
    """
    model_type = PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
    if model_type not in MODELS:
        raise ValueError(f"{name_or_path} is a model of type '{model_type}', expected one of {', '.join(MODELS)}.")
    config_class = MODELS[model_type].config_class
    if unknown := config.keys() - {known.name for known in fields(config_class)}:
        raise ValueError(
            f"{name_or_path} has a {config_class.__name__}, which has no {', '.join(sorted(unknown))}: pass other "
            "fields as --model_config, or {} for none of those that a recipe has."
        )
    if "image_size" in config and model_type == VQRAEConfig.model_type:  # the encoder sees the grid that it gives
        saved = VQRAEConfig.from_pretrained(name_or_path)
        grid = config["image_size"] // config.get("decoder_patch_size", saved.decoder_patch_size)
        config = {"encoder_input_size": grid * saved.encoder_patch_size, **config}
    model = MODELS[model_type].from_pretrained(name_or_path, dtype=torch.float32, **config)
    model.config.validate_architecture()  # transformers does it when the model is saved
    return model


def load_processor(name_or_path: str | None, size: int) -> VQRAEImageProcessor:
    """The processor for images of `size` pixels. A model to go on with keeps the filter with which it resizes."""
    processor = VQRAEImageProcessor.for_image_size(size)
    if name_or_path:
        try:
            processor.resample = VQRAEImageProcessor.from_pretrained(name_or_path).resample
        except OSError:  # it was saved without a processor
            pass
    return processor


for model_type, model in MODELS.items():  # AutoModel takes ours in place of the code beside a checkpoint
    AutoConfig.register(model_type, model.config_class)
    AutoModel.register(model.config_class, model)


@contextmanager
def loading(name_or_path: str):
    """Around what a library loads: its errors become a ValueError that names what was to be loaded, in one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{name_or_path} cannot be loaded: {' '.join(str(error).split())}") from error


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
