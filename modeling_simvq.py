"""VQRAE with SimVQ: discrete image tokens on a pretrained vision encoder.

Data flow: pixels in [0, 1] -> encoder -> patch features -> quantizer -> ViT decoder -> pixels.

Sources: SimVQ (arXiv 2411.02038, github.com/youngsheen/SimVQ), VQRAE (arXiv 2511.23386), RAE (arXiv 2510.11690,
github.com/bytetriper/RAE). Method and output names follow the tokenizers of transformers (Janus, Emu3).
"""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, logging


try:
    from .configuration_simvq import VQRAEConfig
    from .quantization_simvq import SimVQ, VectorQuantizer
except ImportError:
    if __package__:  # a real error inside them must not be masked
        raise
    from configuration_simvq import VQRAEConfig
    from quantization_simvq import SimVQ, VectorQuantizer


logger = logging.get_logger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# Decoder
# ---------------------------------------------------------------------------------------------------------------------


def sincos_positions(height: int, width: int, dim: int, device: torch.device) -> torch.Tensor:
    """Fixed 2-d sin-cos positions of MAE and RAE, (height * width, dim), row by row: half the channels tell the
    column and half the row, in the order of MAE's released weights (columns first)."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4))
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float32, device=device),
        torch.arange(width, dtype=torch.float32, device=device),
        indexing="ij",
    )
    angles = [position.reshape(-1, 1) * omega for position in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over (B, heads, N, head_dim), written out; returns (B, N, heads, head_dim) and the weights."""
    weights = F.softmax(query @ key.transpose(2, 3) * scaling, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class VQRAEDecoderAttention(nn.Module):
    def __init__(self, config: VQRAEConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.decoder_hidden_size // config.decoder_num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.decoder_hidden_size, config.decoder_hidden_size)
        self.k_proj = nn.Linear(config.decoder_hidden_size, config.decoder_hidden_size)
        self.v_proj = nn.Linear(config.decoder_hidden_size, config.decoder_hidden_size)
        self.o_proj = nn.Linear(config.decoder_hidden_size, config.decoder_hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention(self, query, key, value, None, dropout=0.0, scaling=self.scaling)
        return self.o_proj(output.reshape(hidden_states.shape))


class VQRAEDecoderLayer(GradientCheckpointingLayer):
    """A pre-norm ViT layer, that of MAE."""

    def __init__(self, config: VQRAEConfig) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.decoder_hidden_size, eps=config.decoder_layer_norm_eps)
        self.attention = VQRAEDecoderAttention(config)
        self.layernorm_after = nn.LayerNorm(config.decoder_hidden_size, eps=config.decoder_layer_norm_eps)
        self.fc1 = nn.Linear(config.decoder_hidden_size, config.decoder_intermediate_size)
        self.fc2 = nn.Linear(config.decoder_intermediate_size, config.decoder_hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(self.layernorm_before(hidden_states))
        return hidden_states + self.fc2(F.gelu(self.fc1(self.layernorm_after(hidden_states))))


class VQRAEDecoder(nn.Module):
    """Latents to normalised pixels: RAE's ViT decoder (a learnable cls token, fixed positions, a linear layer to the
    pixels of each patch), whose weights fit its modules one to one. RAE's positions may have been trained: what they
    have moved is in `position_offsets`."""

    def __init__(self, config: VQRAEConfig) -> None:
        super().__init__()
        self.in_features = config.encoder_config.hidden_size
        self.noise_tau = config.noise_tau
        self.patch_size = config.decoder_patch_size
        self.num_channels = config.num_channels
        self.decoder_embed = nn.Linear(self.in_features, config.decoder_hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.decoder_hidden_size))
        self.position_offsets = None
        if config.decoder_learned_positions:
            self.position_offsets = nn.Parameter(
                torch.zeros(1, config.decoder_hidden_size, config.grid_size, config.grid_size)
            )
        self.decoder_layers = nn.ModuleList(
            [VQRAEDecoderLayer(config) for _ in range(config.decoder_num_hidden_layers)]
        )
        self.decoder_norm = nn.LayerNorm(config.decoder_hidden_size, eps=config.decoder_layer_norm_eps)
        self.decoder_pred = nn.Linear(config.decoder_hidden_size, config.decoder_patch_size**2 * config.num_channels)

    def forward(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, h * w, encoder width) and the grid (h, w) -> (B, channels, h * patch, w * patch), normalised."""
        height, width = grid
        if self.training and self.noise_tau > 0:  # RAE, section 3: a random strength for each image
            sigma = self.noise_tau * torch.rand(len(latents), 1, 1, device=latents.device, dtype=latents.dtype)
            latents = latents + sigma * torch.randn_like(latents)
        hidden_states = self.decoder_embed(latents)
        positions = sincos_positions(height, width, hidden_states.shape[-1], hidden_states.device)
        if self.position_offsets is not None:
            offsets = self.position_offsets
            if offsets.shape[2:] != grid:
                offsets = F.interpolate(offsets, size=grid, mode="bicubic", align_corners=False)
            positions = positions + offsets[0].flatten(1).T
        hidden_states = hidden_states + positions.to(hidden_states.dtype)
        # the cls token has no position
        hidden_states = torch.cat([self.cls_token.expand(len(latents), -1, -1), hidden_states], dim=1)
        for layer in self.decoder_layers:
            hidden_states = layer(hidden_states)
        patches = self.decoder_pred(self.decoder_norm(hidden_states[:, 1:]))
        patches = patches.view(-1, height, width, self.patch_size, self.patch_size, self.num_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(
            -1, self.num_channels, height * self.patch_size, width * self.patch_size
        )


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


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
    """

    decoded_pixel_values: torch.FloatTensor | None = None


@dataclass
class VQRAEOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`, scalar, unless `return_loss=False`):
            `reconstruction_loss + embedding_loss`.
        reconstruction_loss (`torch.FloatTensor`, scalar, unless `return_loss=False`):
            Mean squared error of the pixels.
        embedding_loss (`torch.FloatTensor`, scalar):
            The loss of the quantizer, see [`SimVQ`].
        decoded_pixel_values (`torch.FloatTensor` of shape `(B, channels, height, width)`):
            The reconstruction, see [`VQRAEDecoderOutput`].
        image_tokens (`torch.LongTensor` of shape `(B, h, w)`):
            Indices into the codebook.
        last_hidden_state, quantized_last_hidden_state (`torch.FloatTensor` of shape `(B, h * w, encoder width)`):
            Continuous and quantized features, see [`VQRAEEncoderOutput`].
    """

    loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    embedding_loss: torch.FloatTensor | None = None
    decoded_pixel_values: torch.FloatTensor | None = None
    image_tokens: torch.LongTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    quantized_last_hidden_state: torch.FloatTensor | None = None


class ImageTokenizer(PreTrainedModel):
    """What image tokenizers have in common: images to tokens and back, an encoder that may be frozen, the codebook's
    start.

    A subclass has an [`ImageTokenizerConfig`] and the modules `encoder`, `project_in`, `quantizer`, `project_out` and
    `decoder`; the decoder takes latents (B, h * w, `decoder.in_features`) and a grid (h, w), and gives normalised
    pixels. It defines `_image_features` and `last_layer`, and calls `post_init` and `_set_encoder_trainable` once it is
    built.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    # bf16 codes would be other codes
    _keep_in_fp32_modules_strict = ["quantizer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module in (self.quantizer.embedding, getattr(self.quantizer, "embedding_proj", None)):
            self.quantizer.reset_parameters()
        else:
            super()._init_weights(module)

    def _set_encoder_trainable(self) -> None:
        self.encoder.requires_grad_(not self.config.freeze_encoder)
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval()
        return self

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """`PreTrainedModel.from_pretrained`, after which a frozen encoder is frozen (it returns every parameter
        trainable)."""
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

        One pass over `batches`, of which a uniform sample of `latents_per_code * codebook_size` latents is kept, 2 GiB
        of them at most. With several processes each passes batches of its own, all use the sample of all, and the first
        one's result is every one's. Sets `config.codebook_init` and `config.codebook_init_latents`.

        Args:
            batches: pixels (B, channels, height, width) in [0, 1], or dicts that hold them as `pixel_values`.
            latents_per_code: size of the sample for each code.
            iterations: of k-means.
            seed: of the sample and of k-means; the same seed and batches give the same codebook.

        Raises:
            ValueError: a plain codebook; fewer latents than codes; latents that are not finite.
        """
        if not isinstance(self.quantizer, SimVQ):
            raise ValueError("initialize_codebook needs use_simvq=True.")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        num_processes = torch.distributed.get_world_size() if distributed else 1
        rank = torch.distributed.get_rank() if distributed else 0
        dim, device = self.quantizer.embedding_dim, self.quantizer.embedding.weight.device
        size = math.ceil(min(latents_per_code * self.config.codebook_size, 2**31 // (4 * dim)) / num_processes)
        sample, seen = torch.empty(size, dim, device=device), 0
        generator = torch.Generator().manual_seed(seed * num_processes + rank)
        was_training = self.training
        self.eval()
        for batch in batches:
            pixels = batch if isinstance(batch, torch.Tensor) else batch["pixel_values"]
            latents = self.get_latents(pixels.to(device)).flatten(0, 1).float()
            # reservoir sampling (Vitter 1985, algorithm R): the i-th latent takes a random place of i, if it exists
            position = torch.arange(seen, seen + len(latents))
            place = torch.where(
                position < size, position, (torch.rand(len(latents), generator=generator) * (position + 1)).long()
            )
            kept = (place < size).nonzero().squeeze(1)
            # of several for one place the last one stays
            last = dict(zip(place[kept].tolist(), kept.tolist()))
            sample[list(last)] = latents[list(last.values())]
            seen += len(latents)
        self.train(was_training)
        sample = sample[:seen]
        if distributed:
            samples = [None] * num_processes
            torch.distributed.all_gather_object(samples, sample.cpu())
            sample = torch.cat(samples).to(device)
        self.quantizer.fit(sample, iterations, seed)
        if distributed:
            for tensor in self.quantizer.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
        self.config.codebook_init, self.config.codebook_init_latents = "kmeans", len(sample)

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
            low, high = pixel_values.detach().aminmax()
            if low < -0.5 or high > 1.5:  # what a resize with overshoot gives is fine
                raise ValueError(
                    f"pixel_values must be in [0, 1], got {low.item():.3g} to {high.item():.3g}. They are normalised "
                    "inside the model: use its image processor, which does not."
                )
        return self._grid_of(pixel_values)

    def _image_features(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Checked pixels in [0, 1] and their grid -> continuous features, and what of them is projected and quantized,
        (B, h * w, width) both."""
        raise NotImplementedError

    def _checked_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`_image_features` of pixels that are checked first, without a graph where the encoder is frozen."""
        grid = self._grid(pixel_values)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_encoder):
            return self._image_features(pixel_values, grid)

    def get_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What is quantized: (B, channels, H, W) in [0, 1] -> (B, h * w, `latent_size`), row by row."""
        return self.project_in(self._checked_features(pixel_values)[1])

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Continuous features, for understanding: (B, channels, H, W) in [0, 1] -> (B, h * w, width), row by row."""
        return self._checked_features(pixel_values)[0]

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
            ValueError: another shape, dtype or range; or, in eval mode, features that are not finite.
        """
        features, latents = self._checked_features(pixel_values)
        quantized, embedding_loss, tokens = self.quantizer(self.project_in(latents))
        return VQRAEEncoderOutput(
            last_hidden_state=features,
            quantized_last_hidden_state=self.project_out(quantized),
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
        self, quantized_last_hidden_state: torch.Tensor, grid: tuple[int, int] | None = None
    ) -> VQRAEDecoderOutput:
        """Latents to images; continuous features work too (an RAE).

        Args:
            quantized_last_hidden_state: (B, h * w, width).
            grid: (h, w); not needed for a square one.

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
        pixels = self.decoder(latents, grid).float()  # near 1, bf16 has steps of 1/256
        return VQRAEDecoderOutput(
            decoded_pixel_values=pixels * self._channels(self.config.image_std, pixels)
            + self._channels(self.config.image_mean, pixels)
        )

    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, h, w) int64; `encode(...).image_tokens`."""
        return self.encode(pixel_values).image_tokens

    def decode_image_tokens(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """(B, h, w) -> (B, 3, H, W), float32; `decode(...).decoded_pixel_values`."""
        return self.decode(image_tokens).decoded_pixel_values

    def forward(
        self,
        pixel_values: torch.Tensor,
        image_tokens: torch.Tensor | None = None,
        return_loss: bool | None = None,
    ) -> VQRAEOutput:
        """Encodes and decodes.

        Args:
            pixel_values: as in `encode`.
            image_tokens: (B, h, w), the tokens of these pixels where they are known. Neither encoder nor search runs,
                and the output has no `embedding_loss` and no `last_hidden_state`.
            return_loss: `False` leaves `loss` and `reconstruction_loss` out, for those who compute their own.

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
        decoded = self.decode_latents(encoded.quantized_last_hidden_state, self._grid_of(pixel_values))
        loss = reconstruction_loss = None
        if return_loss is not False:
            loss = reconstruction_loss = F.mse_loss(decoded.decoded_pixel_values, pixel_values.float())
            if encoded.embedding_loss is not None:
                loss = reconstruction_loss + encoded.embedding_loss
        return VQRAEOutput(loss=loss, reconstruction_loss=reconstruction_loss, **decoded, **encoded)


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
        # Patch tokens are all that is used. Heads for anything else would be parameters without gradients, and MAE
        # must not mask.
        for name in ("head", "pooler"):
            if hasattr(self.encoder, name):
                setattr(self.encoder, name, None)
        if hasattr(self.encoder, "use_head"):
            self.encoder.use_head = False
        if hasattr(self.encoder.config, "mask_ratio"):
            self.encoder.config.mask_ratio = 0.0
        # The encoder's last norm without its affine part, as in RAE: whatever encoder, a token has zero mean and unit
        # variance. CLIP and some InternViT do not apply their last norm to patches; here all are treated alike.
        for name in ("layernorm", "post_layernorm", "norm"):
            if hasattr(self.encoder, name):
                setattr(self.encoder, name, nn.Identity())
        self.encoder_norm = nn.LayerNorm(
            width, eps=getattr(config.encoder_config, "layer_norm_eps", 1e-6), elementwise_affine=False
        )
        self._interpolates = "interpolate_pos_encoding" in inspect.signature(self.encoder.forward).parameters

        self.project_in = nn.Linear(width, config.codebook_dim) if config.codebook_dim else nn.Identity()
        quantizer_class = SimVQ if config.use_simvq else VectorQuantizer
        self.quantizer = quantizer_class(
            config.codebook_size, config.latent_size, commitment_cost=config.commitment_cost, legacy=config.legacy
        )
        self.project_out = nn.Linear(config.codebook_dim, width) if config.codebook_dim else nn.Identity()
        self.decoder = VQRAEDecoder(config)
        self.post_init()
        self._set_encoder_trainable()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # called for the modules that own tensors, not for containers (and for the encoder's by the encoder)
        if module in (self.project_in, self.project_out):  # keeps the scale of the features; our choice
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, VQRAEDecoder):
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

    def _image_features(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
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
        if layers:
            kwargs["output_hidden_states"] = True
        outputs = self.encoder(pixel_values.to(self.encoder.dtype), **kwargs)

        def patches(hidden_states: torch.Tensor) -> torch.Tensor:
            if hidden_states.shape[1] < height * width:
                raise ValueError(
                    f"The encoder '{self.encoder.config.model_type}' gives {hidden_states.shape[1]} tokens for a grid "
                    f"of {height} x {width}: it does not give one token per patch."
                )
            # prefix tokens (cls, registers) come first
            return self.encoder_norm(hidden_states[:, -height * width :])

        features = patches(outputs.last_hidden_state)
        if not layers:
            return features, features
        return features, torch.stack([patches(outputs.hidden_states[layer]) for layer in layers]).mean(0)


VQRAEModel.register_for_auto_class("AutoModel")

__all__ = ["ImageTokenizer", "SimVQ", "VectorQuantizer", "VQRAEConfig", "VQRAEModel"]
