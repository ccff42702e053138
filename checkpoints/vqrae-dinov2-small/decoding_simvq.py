"""The decoder of VQRAE: latents to pixels.

Sources: RAE (arXiv 2510.11690, github.com/bytetriper/RAE), MAE (arXiv 2111.06377), ConvNeXt (arXiv 2201.03545).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


try:
    from .configuration_simvq import VQRAEConfig
except ImportError:
    if __package__:  # a real error inside it must not be masked
        raise
    from configuration_simvq import VQRAEConfig


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

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, width) -> the same, and the weights (B, heads, N, N), which only eager attention has."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(self, query, key, value, None, dropout=0.0, scaling=self.scaling)
        return self.o_proj(output.reshape(hidden_states.shape)), weights


class LocalMixing(nn.Module):
    """A depthwise convolution over the grid of the patches, ConvNeXt's: it knows where neighbours are, which attention
    has to learn. The cls token takes no part."""

    kernel_size = 7

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, self.kernel_size, padding=self.kernel_size // 2, groups=width)

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, N, width) whose last h * w are patches -> the same; zeros for what comes before them."""
        before = hidden_states.shape[1] - grid[0] * grid[1]
        maps = hidden_states[:, before:].transpose(1, 2).unflatten(2, grid)
        return F.pad(self.conv(maps).flatten(2).transpose(1, 2), (0, 0, before, 0))


class VQRAEDecoderLayer(GradientCheckpointingLayer):
    """A pre-norm ViT layer, that of MAE; beside its attention, or in place of it, local mixing."""

    def __init__(self, config: VQRAEConfig) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.decoder_hidden_size, eps=config.decoder_layer_norm_eps)
        self.attention = self.local = None
        if config.decoder_mixing != "convolution":
            self.attention = VQRAEDecoderAttention(config)
        if config.decoder_mixing != "attention":
            self.local = LocalMixing(config.decoder_hidden_size)
        self.layernorm_after = nn.LayerNorm(config.decoder_hidden_size, eps=config.decoder_layer_norm_eps)
        self.fc1 = nn.Linear(config.decoder_hidden_size, config.decoder_intermediate_size)
        self.fc2 = nn.Linear(config.decoder_intermediate_size, config.decoder_hidden_size)

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed, weights = self.layernorm_before(hidden_states), None
        if self.attention is not None:
            attended, weights = self.attention(normed)
            hidden_states = hidden_states + attended
        if self.local is not None:
            hidden_states = hidden_states + self.local(normed, grid)
        return hidden_states + self.fc2(F.gelu(self.fc1(self.layernorm_after(hidden_states)))), weights


# normalised pixels (B, channels, h * patch, w * patch), hidden states, attentions
DecoderOutput = tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, tuple[torch.Tensor | None, ...] | None]


def selected(states: tuple[torch.Tensor, ...], wanted: bool | list[int]) -> tuple[torch.Tensor | None, ...] | None:
    """What `output_hidden_states` asks for: all, none, or those of some places, also counted from the end (`None` in
    place of the others), as the models of transformers do. They leave out places that there are not; here these raise
    ValueError, since who asks for a layer goes on to use it."""
    if isinstance(wanted, bool):
        return states if wanted else None
    if outside := [place for place in wanted if not -len(states) <= place < len(states)]:
        raise ValueError(
            f"output_hidden_states asks for the places {outside}: there are {len(states)}, from {-len(states)} to "
            f"{len(states) - 1} (0 is in front of the first layer)."
        )
    kept = {place % len(states) for place in wanted}
    return tuple(state if place in kept else None for place, state in enumerate(states))


class LinearPath(nn.Module):
    """From the codes around a token straight to the pixels of its patch, what least squares can do
    ([`VQRAEModel.initialize_codebook`] fits it); beyond the border codes are zero.

    Args:
        in_features: width of the latents that the decoder takes.
        code_features: width of the codes that they are made of; `None`: latents are codes.
        out_features: pixels of a patch, all channels.
        kernel_size: codes in each direction.
    """

    def __init__(self, in_features: int, code_features: int | None, out_features: int, kernel_size: int) -> None:
        super().__init__()
        self.to_codes = nn.Linear(in_features, code_features) if code_features else nn.Identity()
        self.to_patches = nn.Conv2d(code_features or in_features, out_features, kernel_size, padding=kernel_size // 2)

    def forward(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, h * w, in_features) -> (B, h * w, out_features)."""
        codes = self.to_codes(latents).transpose(1, 2).unflatten(2, grid)
        return self.to_patches(codes).flatten(2).transpose(1, 2)


class VQRAEDecoder(nn.Module):
    """Latents to normalised pixels: RAE's ViT decoder (a learnable cls token, fixed positions, a linear layer to the
    pixels of each patch), whose weights fit its modules one to one. RAE's positions may have been trained: what they
    have moved is in `position_offsets`. Without attention there are neither cls token nor positions. With a linear path
    the layers paint what is missing in its patches."""

    def __init__(self, config: VQRAEConfig) -> None:
        super().__init__()
        self.in_features = config.decoder_in_features
        self.noise_tau = config.noise_tau
        self.patch_size = config.decoder_patch_size
        self.num_channels = config.num_channels
        self.decoder_embed = nn.Linear(self.in_features, config.decoder_hidden_size)
        self.cls_token = self.position_offsets = self.linear_path = None
        if config.decoder_mixing != "convolution":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.decoder_hidden_size))
        if config.decoder_learned_positions:
            self.position_offsets = nn.Parameter(
                torch.zeros(1, config.decoder_hidden_size, config.grid_size, config.grid_size)
            )
        self.decoder_layers = nn.ModuleList(
            [VQRAEDecoderLayer(config) for _ in range(config.decoder_num_hidden_layers)]
        )
        self.decoder_norm = nn.LayerNorm(config.decoder_hidden_size, eps=config.decoder_layer_norm_eps)
        pixels = config.decoder_patch_size**2 * config.num_channels
        self.decoder_pred = nn.Linear(config.decoder_hidden_size, pixels)
        if config.decoder_linear_path:
            self.linear_path = LinearPath(self.in_features, config.codebook_dim, pixels, config.decoder_linear_path)

    def forward(
        self,
        latents: torch.Tensor,
        grid: tuple[int, int],
        output_hidden_states: bool | list[int] = False,
        output_attentions: bool = False,
    ) -> DecoderOutput:
        """Paints latents (B, h * w, in_features) of a grid (h, w), see [`VQRAEOutput`] for the rest."""
        height, width = grid
        if self.training and self.noise_tau > 0:  # RAE, section 3: a random strength for each image
            sigma = self.noise_tau * torch.rand(len(latents), 1, 1, device=latents.device, dtype=latents.dtype)
            latents = latents + sigma * torch.randn_like(latents)
        hidden_states = self.decoder_embed(latents)
        if self.cls_token is not None:
            positions = sincos_positions(height, width, hidden_states.shape[-1], hidden_states.device)
            if self.position_offsets is not None:
                offsets = self.position_offsets
                if offsets.shape[2:] != grid:
                    offsets = F.interpolate(offsets, size=grid, mode="bicubic", align_corners=False)
                positions = positions + offsets[0].flatten(1).T
            hidden_states = hidden_states + positions.to(hidden_states.dtype)
            # the cls token has no position
            hidden_states = torch.cat([self.cls_token.expand(len(latents), -1, -1), hidden_states], dim=1)
        states, attentions = (hidden_states,), () if output_attentions else None
        for layer in self.decoder_layers:
            hidden_states, weights = layer(hidden_states, grid)
            if output_hidden_states:
                states += (hidden_states,)
            if output_attentions:
                attentions += (weights,)
        patches = self.decoder_pred(self.decoder_norm(hidden_states[:, -height * width :]))
        if self.linear_path is not None:
            patches = patches + self.linear_path(latents, grid)
        patches = patches.view(-1, height, width, self.patch_size, self.patch_size, self.num_channels)
        pixels = patches.permute(0, 5, 1, 3, 2, 4).reshape(
            -1, self.num_channels, height * self.patch_size, width * self.patch_size
        )
        return pixels, selected(states, output_hidden_states), attentions


__all__ = ["VQRAEDecoder"]
