"""Options of training."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments

from eval.files import read_fields
from reading.wording import did_you_mean
from training.losses import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES


def parse_model_config(given: dict | str | None) -> dict | None:
    """The fields of a configuration, given as such, as JSON, or as the name of a JSON file.

    Raises:
        ValueError: it is nothing of these.
    """
    if isinstance(given, str):
        if given.endswith(".json"):
            return read_fields(Path(given))
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"model_config must be JSON, got {given}: {error}") from error
    if not isinstance(given, dict | None):
        raise ValueError(f"model_config must have fields with names, got {given}.")
    return given


@dataclass
class CommonTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what the training of tokenizers and that of generators have in common."""

    ema_decay: float = field(
        default=0.999,
        metadata={
            "help": "Decay of the moving average of the weights, which is evaluated and saved as the model; 0: off. "
            "Early in training it is (1 + step) / (10 + step) at most."
        },
    )
    logging_steps: float = field(
        default=10,
        metadata={"help": "Steps between lines of the log, or a share of all steps where it is below 1 (default: 10)."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.remove_unused_columns = False  # what the model gets is made when an item is read
        if self.device.type == "cpu":  # nothing to copy to, and torch warns of each loader
            self.dataloader_pin_memory = False
        if self.ddp_find_unused_parameters is None:  # every parameter gets a gradient: no need to look
            self.ddp_find_unused_parameters = False
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}.")


@dataclass
class VQRAETrainingArguments(CommonTrainingArguments):
    """`TrainingArguments` with the losses of VQRAE and defaults that suit images."""

    l1_weight: float = field(default=0.0, metadata={"help": "Weight of the mean absolute pixel error."})
    l2_weight: float = field(default=1.0, metadata={"help": "Weight of the mean squared pixel error."})
    gradient_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the mean absolute error of differences between neighbouring pixels, against a visible "
            "grid of patches."
        },
    )
    lpips_weight: float = field(
        default=1.1,
        metadata={
            "help": "Weight of LPIPS (VQRAE: 1.1), which stays in fp32 under --bf16. 0: off, and no weights of it are "
            "needed."
        },
    )
    lpips_network: str = field(default="vgg", metadata={"help": "Backbone of LPIPS: vgg or alex."})
    convnext_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the squared error of ConvNeXt-S logits, in fp32 as LPIPS (VQRAE, TiTok: 0.1)."},
    )
    perceptual_weights: str | None = field(
        default=None,
        metadata={
            "help": "Folder with torchvision's files of LPIPS and ConvNeXt-S. Default: torch hub cache, download."
        },
    )
    perceptual_optional: bool = field(
        default=False, metadata={"help": "Train without LPIPS and ConvNeXt-S where their weights cannot be had."}
    )
    vq_weight: float = field(default=1.0, metadata={"help": "Weight of the quantizer's own loss."})
    distillation_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the squared error between the continuous features of the encoder and those of a frozen "
            "copy of it from before training. Default: 1.0 in --stage 2 (VQRAE), else 0."
        },
    )
    quantizer_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of the quantizer, as a multiple of --learning_rate."}
    )
    codebook_init_images: int | None = field(
        default=None,
        metadata={
            "help": "Crops of training images to which k-means codes, fused latents and the linear path are fitted. "
            "Default: as many as give 32 latents a code, and up to 256 where there are few codes."
        },
    )
    train_projections: bool = field(
        default=False,
        metadata={
            "help": "Train the projections of fused latents (pixel_weight) in stage 1, too. Default: they stay as "
            "fitted; stage 2 trains them with the encoder, the one in front at its learning rate."
        },
    )
    token_passes: int = field(
        default=0,
        metadata={
            "help": "For stage 1: crop and tokenize every training image so many times before training (kept in "
            "output_dir/tokens), and train the decoder alone on these, which saves the encoder in every step. Epoch e "
            "has the crops of pass e modulo token_passes. Unreadable images are listed and left out. Refused with a "
            "learnable projection. 0: off."
        },
    )
    encoder_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Of an encoder that is trained. Default: 1e-5 in --stage 2, else --learning_rate."},
    )
    gan_weight: float = field(default=0.0, metadata={"help": "Weight of the adversarial loss (VQRAE, stage 2: 0.1)."})
    gan_start_step: int = field(default=0, metadata={"help": "First step with the adversarial loss."})
    gan_adaptive: bool = field(
        default=False,
        metadata={
            "help": "Scale the adversarial loss so that its gradient at the decoder's last layer is as long as that of "
            "the reconstruction (VQGAN, RAE), before --gan_weight."
        },
    )
    gan_generator_loss: str = field(default="hinge", metadata={"help": f"One of {', '.join(GENERATOR_LOSSES)}."})
    gan_discriminator_loss: str = field(
        default="hinge", metadata={"help": f"One of {', '.join(DISCRIMINATOR_LOSSES)}."}
    )
    lecam_weight: float = field(default=0.0, metadata={"help": "Weight of LeCam regularization (TiTok: 0.001)."})
    discriminator: str = field(
        default="patchgan", metadata={"help": "patchgan (VQGAN, SimVQ) or dino (RAE); in bf16 under --bf16."}
    )
    discriminator_name_or_path: str = field(
        default="facebook/dino-vits8", metadata={"help": "The frozen ViT under the heads of the dino discriminator."}
    )
    discriminator_weights: str | None = field(
        default=None, metadata={"help": "A discriminator.safetensors of an earlier run, to start from."}
    )
    discriminator_start_step: int | None = field(
        default=None, metadata={"help": "First step in which the discriminator learns. Default: --gan_start_step."}
    )
    discriminator_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of its AdamW."})
    discriminator_adam_beta1: float = field(default=0.5, metadata={"help": "Beta 1 of its AdamW."})
    discriminator_adam_beta2: float = field(default=0.9, metadata={"help": "Beta 2 of its AdamW."})
    discriminator_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of its AdamW."})
    discriminator_lr_scheduler_type: str = field(default="constant", metadata={"help": "As --lr_scheduler_type."})
    discriminator_warmup_steps: int = field(default=0, metadata={"help": "Warm-up of its schedule, in its steps."})
    discriminator_max_grad_norm: float = field(default=1.0, metadata={"help": "Its gradient clipping; 0: none."})
    discriminator_augment: bool = field(
        default=False, metadata={"help": "DiffAugment for what the discriminator sees (RAE)."}
    )
    discriminator_cutout: float = field(
        default=0.0, metadata={"help": "Side of DiffAugment's cutout, as a share of the image's."}
    )
    max_nonfinite_steps: int = field(
        default=10,
        metadata={
            "help": "Steps with a loss or gradient that is not finite are skipped. The run ends after so many in a row."
        },
    )
    num_pictures: int = field(default=16, metadata={"help": "Held-out images in the picture of each evaluation."})
    push_to_hub: bool = field(
        default=False, metadata={"help": "Push the model to the hub, at every checkpoint and at the end."}
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={"help": "The repository to push to, OWNER/NAME. Default: yours, with the name of --output_dir."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.label_names = ["pixel_values"]
        self.batch_eval_metrics = True
        if self.ddp_broadcast_buffers is None:  # every process has the same codebook: no need to send it
            self.ddp_broadcast_buffers = False
        if self.discriminator_start_step is None:
            self.discriminator_start_step = self.gan_start_step
        if not (self.l1_weight or self.l2_weight or self.lpips_weight):
            raise ValueError("l1_weight, l2_weight and lpips_weight are all 0: nothing would train the decoder.")
        for name in ("quantizer_lr_multiplier", "gradient_weight", "gan_weight", "lecam_weight", "distillation_weight"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError("bf16_full_eval and fp16_full_eval would round the weights that are saved: pass --bf16.")
        if self.save_on_each_node:
            raise ValueError("save_on_each_node is not supported: put --output_dir on a disk that all nodes see.")
        for name, choices in (
            ("gan_generator_loss", GENERATOR_LOSSES),
            ("gan_discriminator_loss", DISCRIMINATOR_LOSSES),
            ("discriminator", ("patchgan", "dino")),
        ):
            if getattr(self, name) not in choices:
                given = getattr(self, name)
                meant = did_you_mean(given, choices) or "."
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got '{given}'{meant}")
        if self.codebook_init_images is not None and self.codebook_init_images < 1:
            raise ValueError(f"codebook_init_images must be at least 1, got {self.codebook_init_images}.")
        if self.token_passes < 0:
            raise ValueError(f"token_passes must not be negative, got {self.token_passes}.")
        if self.max_nonfinite_steps < 1:
            raise ValueError(f"max_nonfinite_steps must be at least 1, got {self.max_nonfinite_steps}.")
        if self.gan_weight and self.mixed_precision == "fp16":
            raise ValueError("A GAN in fp16 would need a gradient scaler for each network: use --bf16, or neither.")
