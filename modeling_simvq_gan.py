"""The SimVQ paper's own image tokenizers: a convolutional encoder and decoder around a SimVQ quantizer.

Source: arXiv 2411.02038; github.com/youngsheen/SimVQ, taming/modules/diffusionmodules/improved_model.py (from
Open-MAGVIT2) for the structure. The names in the state dict are the reference's but for `quantizer`, which it calls
`quantize`; `convert/simvq_checkpoint.py` converts its checkpoints.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling


try:
    from .configuration_simvq_gan import NORM_GROUPS, SimVQGANConfig
    from .decoding_simvq import DecoderOutput, selected
    from .quantization_simvq import SimVQ
    from .tokenizer_simvq import ImageTokenizer
except ImportError:
    if __package__:  # a real error inside them must not be masked
        raise
    from configuration_simvq_gan import NORM_GROUPS, SimVQGANConfig
    from decoding_simvq import DecoderOutput, selected
    from quantization_simvq import SimVQ
    from tokenizer_simvq import ImageTokenizer


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


class SimVQGANResBlock(GradientCheckpointingLayer):
    """Norm, SiLU and 3 x 3 convolution, twice, beside a shortcut: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.conv1(F.silu(self.norm1(hidden_states)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return self.nin_shortcut(hidden_states) + residual


def res_blocks(in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    widths = [in_channels] + [out_channels] * count
    return nn.Sequential(*(SimVQGANResBlock(*pair) for pair in zip(widths, widths[1:])))


class DepthToSpace(nn.Module):
    """(B, 4 C, H, W) -> (B, C, 2 H, 2 W). The place within each 2 x 2 square is the slow part of the channel's index,
    where that of `nn.PixelShuffle` is the fast one."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = hidden_states.shape
        hidden_states = hidden_states.view(batch, 2, 2, channels // 4, height, width)
        return hidden_states.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // 4, 2 * height, 2 * width)


class SimVQGANEncoder(nn.Module):
    """Normalised pixels (B, channels, H, W) -> latents (B, latent_channels, H / patch, W / patch)."""

    def __init__(self, config: SimVQGANConfig) -> None:
        super().__init__()
        channels = config.base_channels
        self.conv_in = nn.Conv2d(config.num_channels, channels, 3, padding=1, bias=False)
        self.down = nn.Sequential()
        for level, width in enumerate(config.level_channels):
            stage = OrderedDict(block=res_blocks(channels, width, config.num_res_blocks))
            if level < len(config.level_channels) - 1:
                stage["downsample"] = nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.down.append(nn.Sequential(stage))
            channels = width
        self.mid_block = res_blocks(channels, channels, config.num_res_blocks)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 1)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The latents; and the maps in front of the first level and behind each, (B, channels, height, width)."""
        hidden_states = self.conv_in(pixels)
        states = [hidden_states]
        for stage in self.down:
            hidden_states = stage(hidden_states)
            states.append(hidden_states)
        hidden_states = self.mid_block(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states))), tuple(states)


class SimVQGANDecoder(nn.Module):
    """Latents to normalised pixels, the encoder's mirror."""

    def __init__(self, config: SimVQGANConfig) -> None:
        super().__init__()
        self.in_features = config.latent_channels
        channels = config.level_channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid_block = res_blocks(channels, channels, config.num_res_blocks)
        self.up = nn.ModuleList()  # as the levels: the first one has the full resolution, and comes last
        for level, width in reversed(list(enumerate(config.level_channels))):
            stage = OrderedDict(block=res_blocks(channels, width, config.num_res_blocks))
            if level > 0:
                conv = nn.Conv2d(width, 4 * width, 3, padding=1)
                stage["upsample"] = nn.Sequential(OrderedDict(conv1=conv, depth_to_space=DepthToSpace()))
            self.up.insert(0, nn.Sequential(stage))
            channels = width
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, config.num_channels, 3, padding=1)

    def forward(
        self,
        latents: torch.Tensor,
        grid: tuple[int, int],
        output_hidden_states: bool | list[int] = False,
        output_attentions: bool = False,
    ) -> DecoderOutput:
        """(B, h * w, latent_channels) and the grid (h, w) -> normalised pixels (B, channels, h * patch, w * patch); if
        asked for, the maps in front of the first stage and behind each, (B, channels of the level, its height, its
        width). There is no attention."""
        hidden_states = self.mid_block(self.conv_in(latents.transpose(1, 2).unflatten(2, grid)))
        states = (hidden_states,)
        for stage in reversed(self.up):
            hidden_states = stage(hidden_states)
            if output_hidden_states:
                states += (hidden_states,)
        return self.conv_out(F.silu(self.norm_out(hidden_states))), selected(states, output_hidden_states), None


class SimVQGANModel(ImageTokenizer):
    """The SimVQ paper's image tokenizer (arXiv 2411.02038), see [`SimVQGANConfig`]. Methods and outputs are those of
    [`VQRAEModel`].

    `get_image_features` gives the latents in front of the quantizer as (B, h * w, latent_channels), row by row;
    `features.transpose(1, 2).unflatten(2, (h, w))` is the reference's (B, latent_channels, h, w).
    """

    config_class = SimVQGANConfig
    base_model_prefix = "simvq_gan"
    _no_split_modules = ["SimVQGANResBlock"]

    def __init__(self, config: SimVQGANConfig) -> None:
        super().__init__(config)
        self.encoder = SimVQGANEncoder(config)
        self.project_in = nn.Identity()
        self.quantizer = SimVQ(
            config.codebook_size, config.latent_channels, commitment_cost=config.commitment_cost, legacy=config.legacy
        )
        self.project_out = nn.Identity()
        self.decoder = SimVQGANDecoder(config)
        self.post_init()
        self._set_encoder_trainable()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):  # PyTorch's own, as in the reference
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight

    def get_input_embeddings(self) -> nn.Module:
        """The first convolution."""
        return self.encoder.conv_in

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.conv_in = value

    def _image_features(
        self,
        pixel_values: torch.Tensor,
        grid: tuple[int, int],
        output_hidden_states: bool | list[int] = False,
        output_attentions: bool = False,
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        latents, states = self.encoder(self._normalize(pixel_values).to(self.dtype))
        latents = latents.flatten(2).transpose(1, 2)
        features = BaseModelOutputWithPooling(
            last_hidden_state=latents, hidden_states=selected(states, output_hidden_states)
        )
        return features, latents


SimVQGANModel.register_for_auto_class("AutoModel")
if not __package__:
    AutoModel.register(SimVQGANConfig, SimVQGANModel, exist_ok=True)

__all__ = ["SimVQGANConfig", "SimVQGANModel"]
