"""Configuration of the SimVQ paper's own image tokenizers: a convolutional autoencoder with a SimVQ quantizer."""

from transformers import AutoConfig
from transformers.configuration_utils import strict


try:
    from .configuration_simvq import ImageTokenizerConfig, validate_at_least_one
except ImportError:
    if __package__:  # a real error inside the configuration must not be masked
        raise
    from configuration_simvq import ImageTokenizerConfig, validate_at_least_one


NORM_GROUPS = 32  # of every group norm, as in the reference


@strict
class SimVQGANConfig(ImageTokenizerConfig):
    r"""
    Describes a [`SimVQGANModel`]. The defaults are those of github.com/youngsheen/SimVQ,
    configs/imagenet_simvq_128_B.yaml, with the largest codebook.

    The encoder halves the sides of an image between its levels, so that a token stands for `decoder_patch_size` =
    `2 ** (levels - 1)` pixels a side. Every image whose sides are multiples of it works, also a non-square one.

    Args:
        base_channels (`int`, defaults to 128):
            Channels of the first convolution, a multiple of 32 (the groups of the norms).
        channel_multiplier (`list[int]`, defaults to `[1, 2, 2, 4]`):
            Channels of each level, from the full resolution down, as multiples of `base_channels`.
        num_res_blocks (`int`, defaults to 2):
            Residual blocks of each level, and of the middle.
        latent_channels (`int`, defaults to 128):
            Channels of the latents, the width of the codes.
        image_size (`int`, defaults to 128), codebook_size (`int`, defaults to 262144), legacy (`bool`, defaults to
            `False`), freeze_encoder (`bool`, defaults to `False`): see [`VQRAEConfig`].
        num_channels, commitment_cost, codebook_init, codebook_init_latents, image_mean, image_std: see [`VQRAEConfig`].

    Raises:
        ValueError: a combination that cannot work, with the numbers that contradict each other.

    Example:

    ```python
    >>> from configuration_simvq_gan import SimVQGANConfig
    >>> from modeling_simvq_gan import SimVQGANModel

    >>> config = SimVQGANConfig(base_channels=32, channel_multiplier=[1, 2], image_size=64, codebook_size=128)
    >>> model = SimVQGANModel(config)
    >>> model.config.grid_size  # 64 px, halved once
    32

    ```"""

    model_type = "simvq_gan"

    base_channels: int = 128
    channel_multiplier: list[int] | tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    latent_channels: int = 128
    image_size: int = 128
    codebook_size: int = 262144
    legacy: bool = False
    freeze_encoder: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.channel_multiplier = list(self.channel_multiplier)
        # `@strict` runs every validate_* by itself, but wraps what it raises; called here, it is a plain ValueError
        self.validate_architecture()

    @property
    def level_channels(self) -> list[int]:
        """Channels of each level, from the full resolution down."""
        return [self.base_channels * multiplier for multiplier in self.channel_multiplier]

    @property
    def decoder_patch_size(self) -> int:
        """Side in pixels of what one token stands for."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def hidden_size(self) -> int:
        """Width of the continuous features."""
        return self.latent_channels

    @property
    def latent_size(self) -> int:
        """Width of the vectors that are quantized."""
        return self.latent_channels

    def validate_architecture(self):
        validate_at_least_one(self, "base_channels", "num_res_blocks", "latent_channels")
        if not self.channel_multiplier or min(self.channel_multiplier) < 1:
            raise ValueError(f"channel_multiplier must hold integers of at least 1, got {self.channel_multiplier}.")
        if self.base_channels % NORM_GROUPS:
            raise ValueError(
                f"base_channels {self.base_channels} is not a multiple of {NORM_GROUPS}, the groups of the norms."
            )
        super().validate_architecture()


SimVQGANConfig.register_for_auto_class()
if not __package__:
    AutoConfig.register(SimVQGANConfig.model_type, SimVQGANConfig, exist_ok=True)

__all__ = ["SimVQGANConfig"]
