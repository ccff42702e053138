"""Configuration of VQRAE: a pretrained vision encoder, a SimVQ quantizer and a ViT decoder; and its base, what the
configurations of all image tokenizers here have in common."""

import difflib
from dataclasses import fields

import transformers
from packaging.version import Version
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging


OLDEST_TRANSFORMERS = "5.20"
if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"This image tokenizer needs transformers >= {OLDEST_TRANSFORMERS}, but {transformers.__version__} is "
        f'installed: pip install -U "transformers>={OLDEST_TRANSFORMERS}"'
    )

from transformers.configuration_utils import SubConfigSpec, strict  # noqa: E402


logger = logging.get_logger(__name__)

# what a config.json may hold beside the fields of its class: written by transformers for any model
_OF_ANY_MODEL = {"auto_map", "custom_pipelines", "model_type", "num_labels", "quantization_config", "torch_dtype"}
_OF_ANY_MODEL |= {"attn_implementation", "experts_implementation", "name_or_path", "output_attentions", "use_cache"}


def _side(size, what: str) -> int:
    """One side in pixels from a config's int or equal-sided pair (InternViT writes pairs)."""
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1:
        raise ValueError(f"{what} must be square, got {size}.")
    return sides.pop()


def validate_at_least_one(config: PreTrainedConfig, *names: str) -> None:
    """Fields that count something; `None` is not set and passes.

    Raises:
        ValueError: one of them is below 1.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


@strict
class ImageTokenizerConfig(PreTrainedConfig):
    """Fields that every image tokenizer has; [`VQRAEConfig`] says what they are. A subclass also has
    `decoder_patch_size`, the side in pixels of what one token stands for, `hidden_size`, the width of the continuous
    features, and `latent_size`, that of the vectors that are quantized."""

    image_size: int = 256
    num_channels: int = 3
    codebook_size: int = 16384
    commitment_cost: float | int = 0.25
    legacy: bool = True
    codebook_init: str = "gaussian"
    codebook_init_latents: int | None = None
    freeze_encoder: bool = True
    image_mean: list[float | int] | tuple[float | int, ...] | float | int | None = None
    image_std: list[float | int] | tuple[float | int, ...] | float | int | None = None

    # of the outputs, what a stock Trainer does not gather in evaluation
    keys_to_ignore_at_inference = ["quantized_last_hidden_state", "reconstruction_loss", "embedding_loss"]

    def __post_init__(self, **kwargs):
        known = {field.name for field in fields(self)}
        for name in [name for name in kwargs if name not in _OF_ANY_MODEL and not name.startswith("_")]:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {nearest[0]}?" if nearest else f". It has {', '.join(self._own_fields())}."
            if self.transformers_version is None:
                raise TypeError(f"{type(self).__name__} has no field '{name}'{hint}")
            # read from a file that a later version of this code may have written
            logger.warning(f"{type(self).__name__} has no field '{name}', it is ignored{hint}")
            del kwargs[name]
        super().__post_init__(**kwargs)
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            value = 0.5 if value is None else value
            setattr(self, name, [value] * self.num_channels if isinstance(value, (int, float)) else list(value))

    @classmethod
    def _own_fields(cls) -> list[str]:
        return sorted({field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)})

    @property
    def grid_size(self) -> int:
        """Tokens along one side of an image of `image_size`."""
        return self.image_size // self.decoder_patch_size

    def validate_architecture(self):
        """Checked at construction and before saving."""
        validate_at_least_one(self, "image_size", "decoder_patch_size", "num_channels", "codebook_size")
        if not self.commitment_cost >= 0:
            raise ValueError(f"commitment_cost must not be negative, got {self.commitment_cost}.")
        if self.codebook_init not in ("gaussian", "kmeans"):
            raise ValueError(f"codebook_init must be 'gaussian' or 'kmeans', got '{self.codebook_init}'.")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != self.num_channels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values for num_channels = {self.num_channels}."
                )
        if not all(value > 0 for value in self.image_std):
            raise ValueError(f"image_std must be positive, got {self.image_std}.")
        if self.image_size % self.decoder_patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of its patch size {self.decoder_patch_size}: take "
                f"{max(1, self.grid_size) * self.decoder_patch_size}, for example."
            )


@strict
class VQRAEConfig(ImageTokenizerConfig):
    r"""
    Describes a [`VQRAEModel`]. With no arguments: a SigLIP-base-sized encoder for 256 px (random weights), SimVQ with
    16,384 codes of the encoder's width, and a decoder that mirrors the encoder.

    The encoder turns `encoder_input_size / encoder patch` squared patches into tokens and the decoder turns each token
    into `decoder_patch_size` squared pixels; both grids must agree. Other image sizes, also non-square ones, work at
    run time: every multiple of `decoder_patch_size` is a grid of its own.

    Args:
        encoder_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the vision encoder; a dict needs `model_type`. Any vision model of transformers that
            returns one token per patch after its prefix tokens.
        encoder_input_size (`int`, *optional*, defaults to the encoder's own `image_size`):
            Side in pixels at which the encoder sees an image of `image_size` (RAE shows DINOv2 224 px of 256).
        encoder_layers (`list[int]`, *optional*):
            Layers of the encoder whose outputs are quantized: each normalised, then their mean (or, with
            `pixel_weight`, side by side); 0 is the patch embedding, `num_hidden_layers` the last one. `None`: the last
            one alone, as in VQRAE. The last layers of a self-supervised encoder have lost colour and texture, which the
            first ones still hold; tokens of both keep both (DualToken, arXiv 2503.14324, quantizes the two apart). The
            continuous features are the last layer's in any case.
        pixel_weight (`float`, *optional*):
            Fuses what the layers mean and what they look like: of `encoder_layers`, the last listed one keeps its
            meaning, and the others predict the pixels of the token's patch. Tokens are codes of [last layer, pixels] on
            `codebook_dim` directions, with the pixels' total variance `pixel_weight**2` times that of the layer. All
            of it is fitted by [`VQRAEModel.initialize_codebook`], which has to be called. (TokenFlow, arXiv 2412.03069,
            and IDEAL train such a fusion.) `None`: no fusion.
        latents_fit (`dict`, *optional*):
            What the fit of fused latents saw and reached: `images`, `tokens`, `variance_kept` by the directions, and
            `pixels_psnr` in dB of the predicted pixels; `None` as long as it was not done.
        image_size (`int`, defaults to 256):
            Side in pixels of the images that go in and come out.
        decoder_patch_size (`int`, defaults to 16):
            Side in pixels of the patch that the decoder paints for each token.
        num_channels (`int`, defaults to 3):
            Colour channels, those of the encoder.
        codebook_size (`int`, defaults to 16384):
            Number of codes, the vocabulary of the image tokens.
        codebook_dim (`int`, *optional*):
            Width of the codes. `None`: the encoder's width, and no projections. Otherwise one linear layer in front of
            the quantizer and one behind it, as in VQRAE (arXiv 2511.23386).
        commitment_cost (`float`, defaults to 0.25):
            Beta of the vector quantization loss.
        legacy (`bool`, defaults to `True`):
            Which of its two terms beta weighs; see [`SimVQ`].
        use_simvq (`bool`, defaults to `True`):
            `False`: a plain learnable codebook (VQGAN), the baseline that collapses.
        codebook_init (`str`, defaults to `"gaussian"`):
            Where the codes start: `"gaussian"` as in the reference, or `"kmeans"`, fitted to the latents of images by
            [`VQRAEModel.initialize_codebook`], which has to be called.
        codebook_init_latents (`int`, *optional*):
            The number of latents to which the codes were fitted; `None` as long as they were not.
        freeze_encoder (`bool`, defaults to `True`):
            Keep the encoder without gradients and in eval mode (stage 1); `False` trains it (stage 2).
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size
            (`int`, *optional*): Size of the decoder. `None`: the encoder's ("symmetric decoder").
        decoder_mixing (`str`, defaults to `"attention"`):
            How the decoder's layers see other tokens: `"attention"` (VQRAE, a plain ViT), `"convolution"` (ConvNeXt's
            depthwise one, over 7 x 7 tokens) or `"both"`, one beside the other.
        decoder_linear_path (`int`, *optional*):
            1, 3 or 5: what the decoder paints is a linear map of that many codes in each direction, plus what its
            layers add. `initialize_codebook` fits the map by least squares; the layers add nothing before the first
            step.
        decoder_layer_norm_eps (`float`, defaults to 1e-6):
            Epsilon of the decoder's layer norms (RAE's decoders: 1e-12).
        decoder_learned_positions (`bool`, defaults to `False`):
            Adds learned offsets to the decoder's fixed positions, one for each token of an image of `image_size`,
            interpolated (bicubic) for other sizes. They start at zero. RAE's training script trains its positions.
        noise_tau (`float`, defaults to 0.0):
            While training, latents in front of the decoder get noise of standard deviation `noise_tau * U(0, 1)`, one
            draw per image (RAE: 0.8, VQRAE: 0).
        image_mean, image_std (`list[float]`, or a number for all channels, default 0.5):
            Statistics with which the encoder's pixels are normalised, inside the model. Pixels are in [0, 1] outside.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the decoder's initial weights.

    Raises:
        TypeError: a field that there is not, with the nearest that there is. (In a file it is ignored with a warning:
            a later version may have written it.)
        ValueError: a combination that cannot work, with the numbers that contradict each other.

    Example:

    ```python
    >>> from configuration_simvq import VQRAEConfig
    >>> from modeling_simvq import VQRAEModel

    >>> encoder = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    ...            "patch_size": 14, "image_size": 56}
    >>> model = VQRAEModel(VQRAEConfig(encoder_config=encoder, image_size=64, codebook_size=128))
    >>> model.config.grid_size  # 56 / 14 tokens a side in, 64 / 16 patches a side out
    4

    ```"""

    model_type = "vqrae"
    sub_configs_defaults = {
        "encoder_config": SubConfigSpec(
            config_class=AutoConfig, model_type="siglip_vision_model", init_kwargs={"image_size": 256}
        )
    }

    encoder_config: dict | PreTrainedConfig | None = None
    encoder_input_size: int | None = None
    encoder_layers: list[int] | tuple[int, ...] | None = None
    pixel_weight: float | int | None = None
    latents_fit: dict | None = None
    decoder_patch_size: int = 16
    codebook_dim: int | None = None
    use_simvq: bool = True
    decoder_hidden_size: int | None = None
    decoder_num_hidden_layers: int | None = None
    decoder_num_attention_heads: int | None = None
    decoder_intermediate_size: int | None = None
    decoder_mixing: str = "attention"
    decoder_linear_path: int | None = None
    decoder_layer_norm_eps: float | int = 1e-6
    decoder_learned_positions: bool = False
    noise_tau: float | int = 0.0
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)  # makes encoder_config a PreTrainedConfig
        encoder = self.encoder_config
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"):
            if not hasattr(encoder, name):
                raise ValueError(
                    f"encoder_config of type '{encoder.model_type}' has no {name}: it is not the configuration of a "
                    "vision transformer. For an image-text model, pass the configuration of its vision part."
                )
        if self.encoder_input_size is None:
            self.encoder_input_size = _side(encoder.image_size, "encoder_config.image_size")
        if self.encoder_layers is not None:
            self.encoder_layers = list(self.encoder_layers)
        if self.decoder_hidden_size is None:
            self.decoder_hidden_size = encoder.hidden_size
        if self.decoder_num_hidden_layers is None:
            self.decoder_num_hidden_layers = encoder.num_hidden_layers
        if self.decoder_num_attention_heads is None:
            self.decoder_num_attention_heads = encoder.num_attention_heads
        if self.decoder_intermediate_size is None:
            mlp_ratio = getattr(encoder, "mlp_ratio", 4)
            self.decoder_intermediate_size = getattr(encoder, "intermediate_size", int(encoder.hidden_size * mlp_ratio))
        # `@strict` runs every validate_* by itself, but wraps what it raises; called here, it is a plain ValueError
        self.validate_architecture()

    def to_dict(self) -> dict:
        """Without the name of the folder, on somebody's disk, that the encoder was read from."""
        fields = super().to_dict()
        fields["encoder_config"]["_name_or_path"] = ""
        return fields

    @property
    def encoder_patch_size(self) -> int:
        """Side in pixels of the encoder's patches."""
        return _side(self.encoder_config.patch_size, "encoder_config.patch_size")

    @property
    def hidden_size(self) -> int:
        """Width of the continuous features."""
        return self.encoder_config.hidden_size

    @property
    def latent_size(self) -> int:
        """Width of the vectors that are quantized."""
        return self.codebook_dim or self.hidden_size

    @property
    def quantized_features(self) -> int:
        """Width of what of the encoder's layers is projected and quantized."""
        return self.hidden_size * (len(self.encoder_layers) if self.pixel_weight else 1)

    @property
    def decoder_in_features(self) -> int:
        """Width of the latents that the decoder takes: that of the features; of fused ones, that of the features and of
        the pixels of a patch."""
        return self.hidden_size + (self.decoder_patch_size**2 * self.num_channels if self.pixel_weight else 0)

    def validate_architecture(self):
        validate_at_least_one(
            self,
            "encoder_input_size",
            "codebook_dim",
            "decoder_hidden_size",
            "decoder_num_hidden_layers",
            "decoder_num_attention_heads",
            "decoder_intermediate_size",
        )
        super().validate_architecture()
        for name in ("decoder_layer_norm_eps", "noise_tau", "initializer_range"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        layers, deepest = self.encoder_layers, self.encoder_config.num_hidden_layers
        if layers is not None and (
            not layers or len(set(layers)) < len(layers) or not all(0 <= layer <= deepest for layer in layers)
        ):
            raise ValueError(f"encoder_layers must be different numbers from 0 to {deepest}, got {layers}.")
        self._validate_fused_latents()
        if self.decoder_mixing not in ("attention", "convolution", "both"):
            raise ValueError(
                f"decoder_mixing must be 'attention', 'convolution' or 'both', got '{self.decoder_mixing}'."
            )
        if self.decoder_learned_positions and self.decoder_mixing == "convolution":
            raise ValueError("decoder_learned_positions needs attention: a convolution has no positions.")
        if self.decoder_linear_path not in (None, 1, 3, 5):
            raise ValueError(f"decoder_linear_path must be 1, 3 or 5, got {self.decoder_linear_path}.")
        if self.decoder_linear_path and self.latent_size > self.decoder_in_features:
            raise ValueError(
                f"decoder_linear_path needs the codes back from the latents: codebook_dim {self.latent_size} must not "
                f"be above their width {self.decoder_in_features}."
            )
        if self.codebook_init == "kmeans" and not self.use_simvq:
            raise ValueError("codebook_init='kmeans' needs use_simvq=True.")
        attends = self.decoder_mixing != "convolution"
        if attends and self.decoder_hidden_size % self.decoder_num_attention_heads:
            raise ValueError(
                f"decoder_hidden_size {self.decoder_hidden_size} is not a multiple of decoder_num_attention_heads "
                f"{self.decoder_num_attention_heads}."
            )
        if attends and self.decoder_hidden_size % 4:
            raise ValueError(
                f"decoder_hidden_size must be a multiple of 4 (2-d sin-cos positions), got {self.decoder_hidden_size}."
            )
        encoder_channels = getattr(self.encoder_config, "num_channels", self.num_channels)
        if encoder_channels != self.num_channels:
            raise ValueError(f"num_channels is {self.num_channels}, but the encoder takes {encoder_channels} channels.")
        if self.encoder_input_size % self.encoder_patch_size:
            raise ValueError(
                f"encoder_input_size {self.encoder_input_size} is not a multiple of its patch size "
                f"{self.encoder_patch_size}."
            )
        encoder_grid = self.encoder_input_size // self.encoder_patch_size
        if encoder_grid != self.grid_size:
            raise ValueError(
                f"The encoder makes {encoder_grid} x {encoder_grid} tokens (encoder_input_size "
                f"{self.encoder_input_size} / patch {self.encoder_patch_size}), but the decoder paints "
                f"{self.grid_size} x {self.grid_size} patches (image_size {self.image_size} / decoder_patch_size "
                f"{self.decoder_patch_size}). Change encoder_input_size, image_size or decoder_patch_size."
            )

    def _validate_fused_latents(self):
        if self.pixel_weight is None:
            if self.latents_fit is not None:
                raise ValueError("latents_fit is what the fit of fused latents says: it needs pixel_weight.")
            return
        if not self.pixel_weight > 0:
            raise ValueError(f"pixel_weight must be positive, got {self.pixel_weight}.")
        if not self.use_simvq:
            raise ValueError("pixel_weight needs use_simvq=True: the codes of fused latents are fitted.")
        if len(self.encoder_layers or []) < 2:
            raise ValueError(
                "pixel_weight needs encoder_layers with the layers that predict pixels and, last, the one whose "
                f"meaning is kept, such as [1, 2, {self.encoder_config.num_hidden_layers}]; got {self.encoder_layers}."
            )
        if self.codebook_dim is None:
            raise ValueError("pixel_weight needs codebook_dim, the number of directions of the fused latents (128).")
        if self.codebook_dim > self.decoder_in_features:
            raise ValueError(
                f"codebook_dim {self.codebook_dim} is above the width of the fused latents, "
                f"{self.decoder_in_features}: {self.hidden_size} of a layer and "
                f"{self.decoder_in_features - self.hidden_size} pixels of a patch."
            )


VQRAEConfig.register_for_auto_class()
if not __package__:  # installed, or in a clone, and not beside a checkpoint: the Auto classes need no trust for it
    AutoConfig.register(VQRAEConfig.model_type, VQRAEConfig, exist_ok=True)

__all__ = ["VQRAEConfig"]
