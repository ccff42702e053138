"""What image tokenizers have in common: images to tokens and back, whatever encodes, quantizes and paints them.

Method and output names follow the tokenizers of transformers (Janus, Emu3).
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple, logging


try:
    from .fitting_simvq import MOST_BYTES, gathered, processes, sample_of_latents, share_first
    from .quantization_simvq import SimVQ
except ImportError:
    if __package__:  # a real error inside them must not be masked
        raise
    from fitting_simvq import MOST_BYTES, gathered, processes, sample_of_latents, share_first
    from quantization_simvq import SimVQ


logger = logging.get_logger(__name__)


@dataclass
class VQRAEEncoderOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, h * w, encoder width)`):
            Continuous features, not quantized; those of VQRAE have zero mean and unit variance per token.
        quantized_last_hidden_state (`torch.FloatTensor` of shape `(B, h * w, config.decoder_in_features)`):
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
        last_hidden_state (`torch.FloatTensor` of shape `(B, h * w, encoder width)`):
            Continuous features, not quantized.
        quantized_last_hidden_state (`torch.FloatTensor` of shape `(B, h * w, config.decoder_in_features)`):
            The codes of the image tokens, as the decoder takes them, see [`VQRAEEncoderOutput`].
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
        # every `from_pretrained`, also that of a model around this one, leaves all trainable, and calls eval
        if self.config.freeze_encoder and all(parameter.requires_grad for parameter in self.encoder.parameters()):
            if mode:
                logger.warning_once(
                    "The encoder was set to be trained, but config.freeze_encoder is true: it is frozen again. Call "
                    "unfreeze_encoder() to train it."
                )
            self.encoder.requires_grad_(False)
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

    def _warn_of_collapse(self) -> None:
        """Codes that were drawn at random and latents that do not move never meet, see docs/collapse.md."""
        moves = self._encoder_learns() or any(parameter.requires_grad for parameter in self.project_in.parameters())
        if not moves and self.config.codebook_init_latents is None:
            logger.warning_once(
                "The codes are trained on an encoder that is frozen, and were never fitted to its latents: nearly all "
                "of them will stay unused. Call initialize_codebook(batches) first; train_hf.py does so by default."
            )

    def _grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Checks pixels; the grid (h, w) of their tokens."""
        if not isinstance(pixel_values, torch.Tensor):
            raise ValueError(
                f"pixel_values must be a tensor, got {type(pixel_values).__name__}: use the image processor, and "
                'model(**processor(images, return_tensors="pt")).'
            )
        if not len(pixel_values):
            raise ValueError(f"pixel_values hold no images, got {tuple(pixel_values.shape)}.")
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
                f"pixel_values are {height} x {width} px: both sides must be positive "
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
        if not math.isfinite(high):
            raise ValueError(f"pixel_values must be in [0, 1], got {seen}: some are not finite.")
        if low >= 0 and high > 100:
            raise ValueError(f"pixel_values must be in [0, 1], got {seen}: divide them by 255.")
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
        """`_image_features` of pixels that are checked first, without a graph where neither the encoder nor the pixels
        want gradients."""
        grid = self._grid(pixel_values)
        # resized and normalised in fp32 at least, also where a trainer has cast the pixels
        pixel_values = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
        wanted = pixel_values.requires_grad or self._encoder_learns()
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            return self._image_features(pixel_values, grid, **outputs)

    def get_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What is quantized: (B, channels, H, W) in [0, 1] -> (B, h * w, `latent_size`), row by row."""
        return self.project_in(self._checked_features(pixel_values)[1])

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Continuous features, for understanding.

        Args:
            pixel_values: as in `encode`.
            output_hidden_states: also what each layer of the encoder gives, prefix tokens (cls, registers) included; or
                the place of the one that is wanted, or a list of places, 0 in front of the first layer, -1 behind the
                last. `hidden_states[place][:, -h * w:]` are the patches.
            output_attentions: also its attentions, where it runs with eager attention.
            return_dict: `False` gives a tuple.

        Returns:
            `last_hidden_state`, (B, h * w, width), row by row, not quantized; `hidden_states` and `attentions` of the
            encoder, if asked for. There is no `pooler_output`.

        Raises:
            ValueError: as `encode`; or a place that there is not.
        """
        return self._checked_features(pixel_values, **self._asked_for(output_hidden_states, output_attentions))[0]

    def _asked_for(
        self, output_hidden_states: bool | int | list[int] | None, output_attentions: bool | None
    ) -> dict[str, bool]:
        """The arguments, or what the configuration says."""
        given = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        asked = {name: getattr(self.config, name) if value is None else value for name, value in given.items()}
        if type(asked["output_hidden_states"]) is int:  # a place; 0 is no `False`
            asked["output_hidden_states"] = [asked["output_hidden_states"]]
        return asked

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
        if not isinstance(image_tokens, torch.Tensor):
            raise ValueError(
                f"image_tokens must be a tensor (B, h, w), got {type(image_tokens).__name__}: pass "
                "encode(...).image_tokens, or torch.tensor(tokens)."
            )
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
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> VQRAEDecoderOutput:
        """Latents to images. Without fused latents (`pixel_weight`), continuous features work too (an RAE).

        Args:
            quantized_last_hidden_state: (B, h * w, `config.decoder_in_features`).
            grid: (h, w); not needed for a square one.
            output_hidden_states, output_attentions: also those of the decoder.

        Raises:
            ValueError: another shape, or a number of tokens that does not fit the grid.
        """
        latents, width = quantized_last_hidden_state, self.decoder.in_features
        if not isinstance(latents, torch.Tensor) or latents.ndim != 3 or latents.shape[-1] != width:
            got = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise ValueError(
                f"Latents must be a tensor (B, h * w, {width}), got {got}: pass "
                "encode(...).quantized_last_hidden_state."
            )
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
        output_hidden_states: bool | int | list[int] | None = None,
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
            if self.training and not torch.compiler.is_compiling():
                self._warn_of_collapse()
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
