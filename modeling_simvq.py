"""VQRAE with SimVQ: discrete image tokens on a pretrained vision encoder.

Data flow: pixels in [0, 1] -> encoder -> patch features -> quantizer -> ViT decoder -> pixels.

Sources: SimVQ (arXiv 2411.02038, github.com/youngsheen/SimVQ), VQRAE (arXiv 2511.23386), RAE (arXiv 2510.11690,
github.com/bytetriper/RAE).
"""

import inspect
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging


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
        share_first,
    )
    from .quantization_simvq import Projection, SimVQ, VectorQuantizer
    from .tokenizer_simvq import ImageTokenizer
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
        share_first,
    )
    from quantization_simvq import Projection, SimVQ, VectorQuantizer
    from tokenizer_simvq import ImageTokenizer


logger = logging.get_logger(__name__)

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

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

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
if not __package__:
    AutoModel.register(VQRAEConfig, VQRAEModel, exist_ok=True)

__all__ = ["ImageTokenizer", "SimVQ", "VectorQuantizer", "VQRAEConfig", "VQRAEModel"]
