"""VQRAE with SimVQ: discrete image tokens on a pretrained vision encoder.

Data flow: pixels in [0, 1] -> encoder -> patch features -> quantizer -> ViT decoder -> pixels.

Sources: SimVQ (arXiv 2411.02038, github.com/youngsheen/SimVQ), VQRAE (arXiv 2511.23386), RAE (arXiv 2510.11690,
github.com/bytetriper/RAE). Method and output names follow the tokenizers of transformers (Janus, Emu3).
"""

import copy
import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple, logging


try:
    from .configuration_simvq import VQRAEConfig
    from .decoding_simvq import VQRAEDecoder, selected
    from .fitting_simvq import (
        MOST_BYTES,
        Moments,
        Reservoir,
        fit_linear_path,
        fuse,
        gathered,
        pixels_of,
        processes,
        sample_of_latents,
        share_first,
    )
    from .quantization_simvq import Projection, SimVQ, VectorQuantizer
except ImportError:
    if __package__:  # a real error inside them must not be masked
        raise
    from configuration_simvq import VQRAEConfig
    from decoding_simvq import VQRAEDecoder, selected
    from fitting_simvq import (
        MOST_BYTES,
        Moments,
        Reservoir,
        fit_linear_path,
        fuse,
        gathered,
        pixels_of,
        processes,
        sample_of_latents,
        share_first,
    )
    from quantization_simvq import Projection, SimVQ, VectorQuantizer


logger = logging.get_logger(__name__)


@dataclass
class VQRAEEncoderOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, h * w, encoder width)`):
            Continuous features, not quantized; those of VQRAE have zero mean and unit variance per token.
        quantized_last_hidden_state (`torch.FloatTensor` of shape `(B, h * w, encoder width)`):
            The codes of the image tokens, as the decoder takes them.
        image_tokens (`torch.LongTensor` of shape `(B, h, w)`):
            Indices into the codebook, row by row.
        embedding_loss (`torch.FloatTensor`, scalar):
            The loss of the quantizer, see [`SimVQ`].
    """

    last_hidden_state: torch.FloatTensor | None = None
    quantized_last_hidden_state: torch.FloatTensor | None = None
    image_tokens: torch.LongTensor | None = None
    embedding_loss: torch.FloatTensor | None = None


@dataclass
class VQRAEDecoderOutput(ModelOutput):
    """
    Args:
        decoded_pixel_values (`torch.FloatTensor` of shape `(B, channels, height, width)`):
            Pixels, float32, nominally in [0, 1]; not clamped, so that a loss sees what overshoots.
        hidden_states, attentions (tuples of `torch.FloatTensor`, if asked for):
            Of the decoder, see [`VQRAEOutput`].
    """

    decoded_pixel_values: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class VQRAEOutput(ModelOutput):
    """
    In training the loss comes first, where those look who take outputs by their place; in eval mode it comes last, and
    the continuous features come first, as pipelines expect.

    Args:
        loss (`torch.FloatTensor`, scalar, unless `return_loss=False`):
            `reconstruction_loss + embedding_loss`.
        last_hidden_state, quantized_last_hidden_state (`torch.FloatTensor` of shape `(B, h * w, encoder width)`):
            Continuous and quantized features, see [`VQRAEEncoderOutput`].
        image_tokens (`torch.LongTensor` of shape `(B, h, w)`):
            Indices into the codebook.
        decoded_pixel_values (`torch.FloatTensor` of shape `(B, channels, height, width)`):
            The reconstruction, see [`VQRAEDecoderOutput`].
        reconstruction_loss (`torch.FloatTensor`, scalar, unless `return_loss=False`):
            Mean squared error of the pixels.
        embedding_loss (`torch.FloatTensor`, scalar):
            The loss of the quantizer, see [`SimVQ`].
        hidden_states (`tuple(torch.FloatTensor)`, with `output_hidden_states=True`):
            Of the decoder: in front of its first layer and behind each, `(B, 1 + h * w, decoder width)`, the cls token
            first. Those of the encoder are in the output of `get_image_features`.
        attentions (`tuple(torch.FloatTensor)`, with `output_attentions=True` and eager attention):
            Of the decoder's layers, `(B, heads, 1 + h * w, 1 + h * w)`.
    """

    loss: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    quantized_last_hidden_state: torch.FloatTensor | None = None
    image_tokens: torch.LongTensor | None = None
    decoded_pixel_values: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    embedding_loss: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class ImageTokenizer(PreTrainedModel):
    """What image tokenizers have in common: images to tokens and back, an encoder that may be frozen, the codebook's
    start.

    A subclass has an [`ImageTokenizerConfig`] and the modules `encoder`, `project_in`, `quantizer`, `project_out` and
    `decoder`; the decoder takes latents (B, h * w, `decoder.in_features`) and a grid (h, w), and gives normalised
    pixels, its hidden states and its attentions. It defines `_image_features` and `last_layer`, and calls `post_init`
    and `_set_encoder_trainable` once it is built.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _keep_in_fp32_modules_strict = ["quantizer"]  # bf16 codes would be other codes
    # each process counts its own tokens: DDP would overwrite them with those of the first
    _ddp_params_and_buffers_to_ignore = ["quantizer._counts", "quantizer._num_nonfinite"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module in (self.quantizer.embedding, getattr(self.quantizer, "embedding_proj", None)):
            self.quantizer.reset_parameters()
        elif module is self.quantizer:
            init.zeros_(module._counts)
            init.zeros_(module._num_nonfinite)
        else:
            super()._init_weights(module)

    def _set_encoder_trainable(self) -> None:
        self.encoder.requires_grad_(not self.config.freeze_encoder)
        self.train(self.training)

    def freeze_encoder(self) -> None:
        """The encoder gets no gradients and stays in eval mode from here on (stage 1); `config.freeze_encoder` says so
        in what is saved. Setting that field alone changes nothing in a model that is built."""
        self.config.freeze_encoder = True
        self._set_encoder_trainable()

    def unfreeze_encoder(self) -> None:
        """The encoder is trained from here on (stage 2). An optimizer that was made before does not know it yet."""
        self.config.freeze_encoder = False
        self._set_encoder_trainable()

    def _encoder_learns(self) -> bool:
        """Whether anything in the encoder is trained: all of it, or adapters in a frozen one (LoRA)."""
        return any(parameter.requires_grad for parameter in self.encoder.parameters())

    def train(self, mode: bool = True):
        super().train(mode)
        if not self._encoder_learns():
            self.encoder.eval()
        return self

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """`PreTrainedModel.from_pretrained`, after which a frozen encoder is frozen (it returns every parameter
        trainable). A `quantization_config` that does not say otherwise (`modules_to_not_convert`, for bitsandbytes
        `llm_int8_skip_modules`) leaves the encoder as it is, so that an 8- or 4-bit model gives the same tokens."""
        quantization = copy.copy(kwargs.get("quantization_config"))
        for skipped in ("modules_to_not_convert", "llm_int8_skip_modules"):
            if getattr(quantization, skipped, ...) is None:
                setattr(quantization, skipped, ["encoder"])
                kwargs["quantization_config"] = quantization
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._set_encoder_trainable()
        return loaded

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last layer, at which VQGAN compares gradients for the adaptive weight."""
        raise NotImplementedError

    @torch.no_grad()
    def initialize_codebook(
        self,
        batches: Iterable[torch.Tensor | dict[str, torch.Tensor]],
        latents_per_code: int = 32,
        iterations: int = 8,
        seed: int = 0,
    ) -> None:
        """Fits the codes to the latents of images, see [`SimVQ.fit`]; on frozen features a Gaussian codebook collapses.
        Where the configuration asks for them, fused latents are fitted first (`pixel_weight`, see `fuse` in
        fitting_simvq.py), and the decoder's linear path last (`decoder_linear_path`); its layers then add nothing.

        One pass over `batches`, of which a uniform sample of `latents_per_code * codebook_size` latents is kept. Where
        more than codes is fitted, features and pixels of whole images are kept, a random sample of at most 4 GiB, and
        the latents are drawn from these. With several processes each passes batches of its own, all use the sums and
        the sample of all, and the first one's result is every one's. Sets `config.codebook_init`,
        `config.codebook_init_latents` and `config.latents_fit`.

        Args:
            batches: pixels (B, channels, height, width) in [0, 1], or dicts that hold them as `pixel_values`. They are
                read once.
            latents_per_code: size of the sample for each code.
            iterations: of k-means.
            seed: of the sample and of k-means; the same seed and batches give the same codebook.

        Raises:
            ValueError: a plain codebook; fewer latents than codes; latents that are not finite; for fused latents,
                images that are all the same.
        """
        if not isinstance(self.quantizer, SimVQ):
            raise ValueError("initialize_codebook needs use_simvq=True.")
        rank, count = processes()
        dim, device = self.quantizer.embedding_dim, self.quantizer.embedding.weight.device
        codes, most = self.config.codebook_size, MOST_BYTES // (4 * dim)
        if latents_per_code * codes > most:
            logger.warning(
                f"{latents_per_code * codes:,} latents of width {dim} are more than the 4 GiB that are kept: the codes "
                f"are fitted to {most:,} latents, {most / codes:.1f} a code."
            )
        size = math.ceil(min(latents_per_code * codes, most) / count)
        generator = torch.Generator().manual_seed(seed * count + rank)
        was_training = self.training
        self.eval()
        if self._fits_images():
            images = self._fit_to_images(batches, generator)
            sample = torch.cat([latents for latents, _, _ in images])
            sample = sample[torch.randperm(len(sample), generator=generator)[:size].to(sample.device)].to(device)
        else:
            sample = sample_of_latents(batches, self.get_latents, size, dim, device, generator)
        sample = gathered(sample)
        self.quantizer.fit(sample, iterations, seed)
        share_first(self.quantizer.state_dict().values())
        if self._fits_images() and self.config.decoder_linear_path:
            self._fit_linear_path(images, generator)
        self.train(was_training)
        self.config.codebook_init, self.config.codebook_init_latents = "kmeans", len(sample)

    def _fits_images(self) -> bool:
        """Whether `initialize_codebook` fits more than codes, and so needs whole images."""
        return False

    def _grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Checks pixels; the grid (h, w) of their tokens."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values must be (B, {self.config.num_channels}, height, width), got {tuple(pixel_values.shape)}."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floating point in [0, 1], got {pixel_values.dtype}: use the image processor, or "
                "divide by 255."
            )
        patch = self.config.decoder_patch_size
        height, width = pixel_values.shape[2:]
        if height % patch or width % patch or not pixel_values.numel():
            raise ValueError(
                f"pixel_values are {height} x {width} px ({len(pixel_values)} images): both sides must be positive "
                f"multiples of decoder_patch_size {patch}."
            )
        if not torch.compiler.is_compiling():
            self._check_range(pixel_values.detach())
        return self._grid_of(pixel_values)

    def _check_range(self, pixel_values: torch.Tensor) -> None:
        """Refuses pixels that were normalised, and lets pass what a resize gives: it overshoots at edges, but keeps the
        means of areas, which normalisation moves. (In [-1, 1], an image whose areas are all brighter than a middle grey
        cannot be told from one in [0, 1].) A step of training with NaN is the trainer's to skip."""
        low, high = (bound.item() for bound in pixel_values.aminmax())
        if self.training and math.isnan(low):
            return
        seen = "NaN" if math.isnan(low) else f"{low:.3g} to {high:.3g}"
        if low >= -0.5 and high <= 1.5:
            if low >= -0.05 and high <= 1.05:
                return
            areas = [min(16, max(1, side // 8)) for side in pixel_values.shape[2:]]
            means = F.adaptive_avg_pool2d(pixel_values.float(), areas)
            low, high = (bound.item() for bound in means.aminmax())
            if low >= -0.05 and high <= 1.05:
                return
            seen += f", with areas whose mean is {low if low < -0.05 else high:.3g}"
        raise ValueError(
            f"pixel_values must be in [0, 1], got {seen}. Pixels are normalised inside the model: use its image "
            "processor, which does not normalise, or undo the normalisation."
        )

    def _image_features(
        self, pixel_values: torch.Tensor, grid: tuple[int, int], **outputs: bool
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """Checked pixels in [0, 1] and their grid -> what `get_image_features` returns; and what of the features is
        projected and quantized, (B, h * w, width). `output_hidden_states` and `output_attentions` as everywhere."""
        raise NotImplementedError

    def _checked_features(self, pixel_values: torch.Tensor, **outputs: bool):
        """`_image_features` of pixels that are checked first, without a graph where nothing in the encoder is
        trained."""
        grid = self._grid(pixel_values)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._encoder_learns()):
            return self._image_features(pixel_values, grid, **outputs)

    def get_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What is quantized: (B, channels, H, W) in [0, 1] -> (B, h * w, `latent_size`), row by row."""
        return self.project_in(self._checked_features(pixel_values)[1])

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Continuous features, for understanding.

        Args:
            pixel_values: as in `encode`.
            output_hidden_states: also what each layer of the encoder gives, prefix tokens (cls, registers) included; or
                the places of those that are wanted, 0 in front of the first layer.
            output_attentions: also its attentions, where it runs with eager attention.
            return_dict: `False` gives a tuple.

        Returns:
            `last_hidden_state`, (B, h * w, width), row by row, not quantized; `hidden_states` and `attentions` of the
            encoder, if asked for. There is no `pooler_output`.

        Raises:
            ValueError: as `encode`.
        """
        return self._checked_features(pixel_values, **self._asked_for(output_hidden_states, output_attentions))[0]

    def _asked_for(
        self, output_hidden_states: bool | list[int] | None, output_attentions: bool | None
    ) -> dict[str, bool]:
        """The arguments, or what the configuration says."""
        given = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        return {name: getattr(self.config, name) if value is None else value for name, value in given.items()}

    def _normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels - self._channels(self.config.image_mean, pixels)) / self._channels(self.config.image_std, pixels)

    @staticmethod
    def _channels(values: list[float], like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)

    def encode(self, pixel_values: torch.Tensor) -> VQRAEEncoderOutput:
        """Images to tokens.

        Args:
            pixel_values: (B, channels, height, width), floating point in [0, 1]; the sides are multiples of
                `decoder_patch_size`.

        Raises:
            ValueError: another shape, dtype or range.
        """
        features, latents = self._checked_features(pixel_values)
        quantized, embedding_loss, tokens = self.quantizer(self.project_in(latents))
        return VQRAEEncoderOutput(
            last_hidden_state=features.last_hidden_state,
            quantized_last_hidden_state=self.project_out(quantized.to(self.dtype)),
            image_tokens=tokens.view(len(tokens), *self._grid_of(pixel_values)),
            embedding_loss=embedding_loss,
        )

    def _grid_of(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        patch = self.config.decoder_patch_size
        return pixel_values.shape[2] // patch, pixel_values.shape[3] // patch

    def _latents_of(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """(B, h, w) tokens -> (B, h * w, width), as the decoder takes them."""
        if image_tokens.ndim != 3 or not image_tokens.numel():
            raise ValueError(
                f"image_tokens must be (B, h, w), got {tuple(image_tokens.shape)}: view a flat sequence of h * w "
                "tokens as its grid first."
            )
        return self.project_out(self.quantizer.get_codebook_entry(image_tokens.flatten(1)).to(self.dtype))

    def decode(self, image_tokens: torch.Tensor) -> VQRAEDecoderOutput:
        """Tokens to images.

        Args:
            image_tokens: (B, h, w), integers in [0, codebook_size).

        Raises:
            ValueError: another shape, or an index outside the codebook.
        """
        return self.decode_latents(self._latents_of(image_tokens), grid=tuple(image_tokens.shape[1:]))

    def decode_latents(
        self,
        quantized_last_hidden_state: torch.Tensor,
        grid: tuple[int, int] | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> VQRAEDecoderOutput:
        """Latents to images; continuous features work too (an RAE).

        Args:
            quantized_last_hidden_state: (B, h * w, width).
            grid: (h, w); not needed for a square one.
            output_hidden_states, output_attentions: also those of the decoder.

        Raises:
            ValueError: another shape, or a number of tokens that does not fit the grid.
        """
        latents, width = quantized_last_hidden_state, self.decoder.in_features
        if latents.ndim != 3 or latents.shape[-1] != width:
            raise ValueError(f"Latents must be (B, h * w, {width}), got {tuple(latents.shape)}.")
        if grid is None:
            grid = (math.isqrt(latents.shape[1]),) * 2
        if grid[0] * grid[1] != latents.shape[1]:
            raise ValueError(f"{latents.shape[1]} latents do not fill a grid of {grid[0]} x {grid[1]}: pass grid.")
        if self._fits_images() and self.config.codebook_init_latents is None and not torch.compiler.is_compiling():
            logger.warning_once(
                "This model paints by what is fitted to images (pixel_weight, decoder_linear_path), and the fit was "
                "never done: call initialize_codebook(batches) first, as train_hf.py does."
            )
        asked_for = self._asked_for(output_hidden_states, output_attentions)
        pixels, hidden_states, attentions = self.decoder(latents, grid, **asked_for)
        pixels = pixels.float()  # near 1, bf16 has steps of 1/256
        return VQRAEDecoderOutput(
            decoded_pixel_values=pixels * self._channels(self.config.image_std, pixels)
            + self._channels(self.config.image_mean, pixels),
            hidden_states=hidden_states,
            attentions=attentions,
        )

    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, h, w) int64; `encode(...).image_tokens`."""
        return self.encode(pixel_values).image_tokens

    def decode_image_tokens(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """(B, h, w) -> (B, 3, H, W), float32; `decode(...).decoded_pixel_values`."""
        return self.decode(image_tokens).decoded_pixel_values

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        image_tokens: torch.Tensor | None = None,
        return_loss: bool = True,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> VQRAEOutput:
        """Encodes and decodes.

        Args:
            pixel_values: as in `encode`.
            image_tokens: (B, h, w), the tokens of these pixels where they are known. Neither encoder nor search runs,
                and the output has no `embedding_loss` and no `last_hidden_state`.
            return_loss: `False` leaves `loss` and `reconstruction_loss` out, for those who compute their own. (The
                default tells a stock `Trainer` that there is a loss without labels.)
            output_hidden_states, output_attentions: also those of the decoder.
            return_dict: `False` gives a tuple.

        Raises:
            ValueError: as `encode` and `decode`; or tokens of another grid than that of the pixels.
        """
        if image_tokens is None:
            encoded = self.encode(pixel_values)
        else:
            grid = len(pixel_values), *self._grid(pixel_values)
            if image_tokens.shape != grid:
                raise ValueError(f"image_tokens are {tuple(image_tokens.shape)}, the pixels need {grid}.")
            encoded = VQRAEEncoderOutput(
                quantized_last_hidden_state=self._latents_of(image_tokens), image_tokens=image_tokens
            )
        decoded = self.decode_latents(
            encoded.quantized_last_hidden_state, self._grid_of(pixel_values), output_hidden_states, output_attentions
        )
        loss = reconstruction_loss = None
        if return_loss:
            loss = reconstruction_loss = F.mse_loss(decoded.decoded_pixel_values, pixel_values.float())
            if encoded.embedding_loss is not None:
                loss = reconstruction_loss + encoded.embedding_loss
        output = VQRAEOutput(
            loss=loss if self.training else None, reconstruction_loss=reconstruction_loss, **decoded, **encoded
        )
        if loss is not None and not self.training:
            output["loss"] = loss  # behind the others, see `VQRAEOutput`
        return output


# How each family was trained, for checkpoints that come without a preprocessor_config.json.
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
PIXEL_STATISTICS = {
    "clip_vision_model": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "dinov2": _IMAGENET,
    "dinov2_with_registers": _IMAGENET,
    "dinov3_vit": _IMAGENET,
    "internvl_vision": _IMAGENET,
    "siglip_vision_model": _HALF,
    "vit": _HALF,
    "vit_mae": _IMAGENET,
}


def read_pixel_statistics(
    name_or_path: str, model_type: str, **hub_kwargs
) -> tuple[dict[str, list[float]], int | None]:
    """`image_mean` and `image_std` that an encoder was trained with, and the side of its images where its processor
    tells; no statistics, where neither that nor `PIXEL_STATISTICS` has them.

    Args:
        name_or_path: of the encoder.
        model_type: of its vision model.
        hub_kwargs: `revision`, `token`, ...
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path, **hub_kwargs)
        statistics, size = (processor.image_mean, processor.image_std), (processor.crop_size or processor.size).height
    except OSError:  # no preprocessor_config.json
        statistics, size = PIXEL_STATISTICS.get(model_type, ()), None
    return dict(zip(("image_mean", "image_std"), map(list, statistics))), size


# What the vision models of transformers are made of, by the names of their parts.
_LAST_NORMS = ("layernorm", "post_layernorm", "norm")
_HEADS = ("head", "pooler")
_BODY = ("embeddings", "rope_embeddings", "pre_layrnorm", "encoder", "layers", "model")


class VQRAEModel(ImageTokenizer):
    """A discrete image tokenizer on a vision encoder (VQRAE, arXiv 2511.23386), see [`VQRAEConfig`].

    `VQRAEModel(config)` has random weights everywhere; `from_encoder_pretrained` starts from a pretrained encoder, and
    `from_pretrained` loads a trained tokenizer.
    """

    config_class = VQRAEConfig
    base_model_prefix = "vqrae"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["VQRAEDecoderLayer"]

    def __init__(self, config: VQRAEConfig) -> None:
        super().__init__(config)
        width = config.encoder_config.hidden_size
        self.encoder = AutoModel.from_config(config.encoder_config)
        self._check_encoder()
        # Patch tokens are all that is used. Heads for anything else would be parameters without gradients, and MAE
        # must not mask.
        for name in _HEADS:
            if hasattr(self.encoder, name):
                setattr(self.encoder, name, None)
        if hasattr(self.encoder, "use_head"):
            self.encoder.use_head = False
        if hasattr(self.encoder.config, "mask_ratio"):
            self.encoder.config.mask_ratio = 0.0
        # The encoder's last norm without its affine part, as in RAE: whatever encoder, a token has zero mean and unit
        # variance. CLIP and some InternViT do not apply their last norm to patches; here all are treated alike.
        for name in _LAST_NORMS:
            if hasattr(self.encoder, name):
                setattr(self.encoder, name, nn.Identity())
        self.encoder_norm = nn.LayerNorm(
            width, eps=getattr(config.encoder_config, "layer_norm_eps", 1e-6), elementwise_affine=False
        )
        self._interpolates = "interpolate_pos_encoding" in inspect.signature(self.encoder.forward).parameters

        self.project_in = nn.Identity()
        if config.codebook_dim:
            self.project_in = Projection(config.quantized_features, config.codebook_dim)
            self._keep_in_fp32_modules_strict = ["project_in", "quantizer"]  # both decide tokens
        quantizer_class = SimVQ if config.use_simvq else VectorQuantizer
        self.quantizer = quantizer_class(
            config.codebook_size, config.latent_size, commitment_cost=config.commitment_cost, legacy=config.legacy
        )
        self.project_out = nn.Identity()
        if config.codebook_dim:
            self.project_out = nn.Linear(config.codebook_dim, config.decoder_in_features)
        self.decoder = VQRAEDecoder(config)
        self.post_init()
        self._set_encoder_trainable()

    def _check_encoder(self) -> None:
        """Refuses an encoder whose parts are not understood: a head or a last norm that stays would go unnoticed."""
        family, parts = self.encoder.config.model_type, [name for name, _ in self.encoder.named_children()]
        if unknown := [name for name in parts if name not in (*_BODY, *_LAST_NORMS, *_HEADS)]:
            raise ValueError(
                f"The encoder '{family}' has the parts {', '.join(unknown)}, and it is not known here whether they "
                "are layers, norms or heads: name them in _BODY, _LAST_NORMS or _HEADS of modeling_simvq.py."
            )
        if sum(name in _LAST_NORMS for name in parts) != 1:
            raise ValueError(
                f"The encoder '{family}' has no last norm that is known here ({', '.join(_LAST_NORMS)}), or several: "
                f"its parts are {', '.join(parts)}."
            )
        if "spatial_shapes" in inspect.signature(self.encoder.forward).parameters:
            raise ValueError(
                f"The encoder '{family}' takes patches of images of any shape (NaFlex) in place of pixels. SigLIP 2 "
                "has checkpoints of a fixed resolution, which load as 'siglip_vision_model': use one of these."
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # called for the modules that own tensors, not for containers (and for the encoder's by the encoder)
        if module in (self.project_in, self.project_out):  # keeps the scale of the features; our choice
            init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            init.zeros_(module.bias)
        elif self.decoder.linear_path and module in (self.decoder.decoder_pred, self.decoder.linear_path.to_patches):
            init.zeros_(module.weight)  # the path alone paints, once it is fitted
            init.zeros_(module.bias)
        elif module is self.decoder:
            if module.cls_token is not None:
                init.normal_(module.cls_token, std=self.config.initializer_range)
            if module.position_offsets is not None:
                init.zeros_(module.position_offsets)
        else:
            super()._init_weights(module)

    def _set_encoder_trainable(self) -> None:
        super()._set_encoder_trainable()
        for name, parameter in self.encoder.named_parameters():
            if name.endswith("mask_token"):  # nothing is ever masked here
                parameter.requires_grad_(False)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.decoder_pred.weight

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding of the encoder."""
        return self.encoder.get_input_embeddings()

    @classmethod
    def from_encoder_pretrained(cls, pretrained_model_name_or_path: str, hub_kwargs: dict | None = None, **config):
        """A new tokenizer on a pretrained encoder: its weights are copied in, and its size, patch and pixel statistics
        are read from its own files.

        Args:
            pretrained_model_name_or_path: a folder or a hub repository with a vision model, or with an image-text
                model that has one (SigLIP, CLIP).
            hub_kwargs: for the hub: `revision`, `token`, `cache_dir`, `local_files_only`, ...
            **config: fields of [`VQRAEConfig`]. Where they are not given, images go in at the encoder's own size and
                come out at the same; with `image_size` alone, the encoder sees the grid that it gives.

        Raises:
            ValueError: not a vision encoder; or its pixel statistics are unknown.
        """
        hub_kwargs = hub_kwargs or {}
        encoder_config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        encoder_config = getattr(encoder_config, "vision_config", encoder_config)
        own_size = getattr(encoder_config, "image_size", None)
        if not hasattr(encoder_config, "patch_size") or own_size is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type '{encoder_config.model_type}' without image "
                "and patch sizes: it is not a vision transformer."
            )
        statistics, size = read_pixel_statistics(pretrained_model_name_or_path, encoder_config.model_type, **hub_kwargs)
        own_size = size or own_size  # DINOv2 has positions for 518 px, but is used at the 224 px of its processor
        config = {**statistics, **config}
        if "image_mean" not in config or "image_std" not in config:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no preprocessor_config.json, and the pixel statistics of "
                f"'{encoder_config.model_type}' are not known here: pass image_mean and image_std."
            )

        patch, own_size = (
            size[0] if isinstance(size, (list, tuple)) else size for size in (encoder_config.patch_size, own_size)
        )
        config.setdefault("decoder_patch_size", patch)
        if "encoder_input_size" not in config:
            given = config.get("image_size")
            config["encoder_input_size"] = own_size if given is None else given // config["decoder_patch_size"] * patch
        config.setdefault("image_size", config["encoder_input_size"] // patch * config["decoder_patch_size"])

        model = cls(VQRAEConfig(encoder_config=encoder_config, **config))
        pretrained = AutoModel.from_pretrained(
            pretrained_model_name_or_path, config=encoder_config, dtype=torch.float32, **hub_kwargs
        )
        weights = pretrained.state_dict()
        own = model.encoder.state_dict()
        missing = sorted(own.keys() - weights.keys())
        if missing:
            raise ValueError(f"{pretrained_model_name_or_path} lacks {len(missing)} weights, first {missing[:3]}.")
        model.encoder.load_state_dict({name: weights[name] for name in own})
        return model

    def _image_features(
        self,
        pixel_values: torch.Tensor,
        grid: tuple[int, int],
        output_hidden_states: bool | list[int] = False,
        output_attentions: bool = False,
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        height, width = grid
        patch = self.config.encoder_patch_size
        kwargs = {"interpolate_pos_encoding": True} if self._interpolates else {}
        if patch != self.config.decoder_patch_size:  # as RAE does: bicubic, no antialias
            pixel_values = F.interpolate(
                pixel_values, size=(height * patch, width * patch), mode="bicubic", align_corners=False
            )
        pixel_values = self._normalize(pixel_values)
        if self.encoder.config.model_type == "vit_mae":  # ascending noise: patches stay in their order
            noise = torch.arange(height * width, device=pixel_values.device, dtype=torch.float32)
            kwargs["noise"] = noise.expand(len(pixel_values), -1)
        layers = self.config.encoder_layers
        outputs = self.encoder(
            pixel_values.to(self.encoder.dtype),
            output_hidden_states=bool(output_hidden_states or layers),
            output_attentions=output_attentions,
            **kwargs,
        )

        def patches(hidden_states: torch.Tensor) -> torch.Tensor:
            if hidden_states.shape[1] < height * width:
                raise ValueError(
                    f"The encoder '{self.encoder.config.model_type}' gives {hidden_states.shape[1]} tokens for a grid "
                    f"of {height} x {width}: it does not give one token per patch."
                )
            # prefix tokens (cls, registers) come first
            return self.encoder_norm(hidden_states[:, -height * width :])

        features = BaseModelOutputWithPooling(
            last_hidden_state=patches(outputs.last_hidden_state),
            hidden_states=selected(outputs.hidden_states or (), output_hidden_states),
            attentions=outputs.attentions if output_attentions else None,
        )
        if not layers:
            return features, features.last_hidden_state
        listed = [patches(outputs.hidden_states[layer]) for layer in layers]
        return features, torch.cat(listed, dim=-1) if self.config.pixel_weight else torch.stack(listed).mean(0)

    # Fits, see `initialize_codebook` ---------------------------------------------------------------------------------

    def _fits_images(self) -> bool:
        return bool(self.config.pixel_weight or self.config.decoder_linear_path)

    def _patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels as the decoder paints them: (B, channels, H, W) -> (B, h * w, patch * patch * channels)."""
        patch = self.config.decoder_patch_size
        pixels = self._normalize(pixel_values.float())
        pixels = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B, channels, h, patch, w, patch
        return pixels.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def _fit_to_images(
        self, batches: Iterable, generator: torch.Generator
    ) -> list[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]]:
        """Fits the projections, where they are fitted; returns a random sample of whole images: latents
        (h * w, latent_size), patches (h * w, pixels) in half precision, and the grid (h, w) of each. On the CPU."""
        config, device = self.config, self.quantizer.embedding.weight.device
        width, pixels = config.quantized_features, config.decoder_patch_size**2 * config.num_channels
        moments, sample, reservoir = Moments(width + pixels, device), [], None
        for batch in logging.tqdm(batches, desc="Features of images", unit="batch"):
            pixel_values = pixels_of(batch, device)
            features = self._checked_features(pixel_values)[1].float()
            patches = self._patches(pixel_values)
            if config.pixel_weight:
                moments.add(torch.cat([features, patches], dim=-1).flatten(0, 1))
            # what the projections will be is known at the end: the features are kept until then
            features, patches = features.to(torch.float16).cpu(), patches.to(torch.float16).cpu()
            if reservoir is None:
                size = MOST_BYTES // processes()[1] // (features[0].nbytes + patches[0].nbytes)
                reservoir = Reservoir(max(1, size), generator)
            for place, which in sorted(reservoir.places(len(features)).items()):
                image = features[which].clone(), patches[which].clone(), self._grid_of(pixel_values)
                sample[place : place + 1] = [image]  # at the end where it is a new place
        if not sample:
            raise ValueError("initialize_codebook got no images.")
        if reservoir.seen > len(sample):
            logger.warning(f"Of {reservoir.seen:,} images, {len(sample):,} are kept for the codes and the linear path.")
        if config.pixel_weight:
            self._fit_projections(moments, reservoir.seen)
        for place, (features, patches, grid) in enumerate(sample):
            sample[place] = self.project_in(features.to(device).float()).float().cpu(), patches, grid
        return sample

    def _fit_projections(self, moments: Moments, images: int) -> None:
        config = self.config
        pixels = config.decoder_patch_size**2 * config.num_channels
        moments.join_processes()
        images = gathered(torch.tensor([images])).sum().item()
        fit = fuse(moments, config.hidden_size, pixels, config.pixel_weight, config.codebook_dim, config.image_std)
        for module, (weight, bias) in ((self.project_in, fit.project_in), (self.project_out, fit.project_out)):
            module.weight.copy_(weight)
            module.bias.copy_(bias)
            share_first((module.weight, module.bias))
        config.latents_fit = {
            "images": images,
            "tokens": int(moments.count),
            "variance_kept": round(fit.variance_kept, 6),
            "pixels_psnr": round(fit.pixels_psnr, 3),
        }

    def _fit_linear_path(self, images: list, generator: torch.Generator) -> None:
        path, device = self.decoder.linear_path, self.quantizer.embedding.weight.device
        if isinstance(path.to_codes, nn.Linear):
            weight, bias = self.project_out.weight.double(), self.project_out.bias.double()
            inverse = torch.linalg.pinv(weight)
            path.to_codes.weight.copy_(inverse)
            path.to_codes.bias.copy_(-inverse @ bias)
        weight, bias = fit_linear_path(
            images, lambda latents: self.quantizer(latents)[0], self.config.decoder_linear_path, generator, device
        )
        path.to_patches.weight.copy_(weight)
        path.to_patches.bias.copy_(bias)
        for parameter in self.decoder.decoder_pred.parameters():
            parameter.zero_()
        share_first([*path.parameters()])
        self.quantizer.reset_codebook_usage()


VQRAEModel.register_for_auto_class("AutoModel")

__all__ = ["ImageTokenizer", "SimVQ", "VectorQuantizer", "VQRAEConfig", "VQRAEModel"]
