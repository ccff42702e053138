"""The adversary of a tokenizer: a discriminator with its own optimizer, schedule and clipping."""

import contextlib
import math
import os

import torch
from accelerate import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import get_scheduler

from training.discriminators import DinoDiscriminator, PatchDiscriminator, augment
from training.losses import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, lecam


WEIGHTS, STATE = "discriminator.safetensors", "discriminator_optimizer.pt"


class _Pair(nn.Module):
    """Real and fake images through the discriminator, one after the other (batch norms see one kind), in one forward
    pass for DistributedDataParallel. Holds LeCam's running averages of the mean logits."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.register_buffer("averages", torch.zeros(2))  # of real and of fake logits

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.discriminator(real), self.discriminator(fake)


class Adversary:
    """Everything about the discriminator but its networks (`training/discriminators.py`).

    Args:
        args: `VQRAETrainingArguments`, those that begin with `gan_` and `discriminator_`.
    """

    average_decay = 0.999  # of LeCam, as in TiTok

    def __init__(self, args) -> None:
        self.args = args
        if args.discriminator == "dino":
            discriminator = DinoDiscriminator(args.discriminator_name_or_path, token=args.hub_token)
        else:
            discriminator = PatchDiscriminator()
        self.pair = _Pair(discriminator).to(args.device)
        if args.discriminator_weights:
            self._load_weights(args.discriminator_weights)
        self.generator_criterion = GENERATOR_LOSSES[args.gan_generator_loss]
        self.criterion = DISCRIMINATOR_LOSSES[args.gan_discriminator_loss]
        self.wrapped = self.optimizer = self.scheduler = None
        self._next_averages = None  # LeCam's, once the step is taken

    def prepare(self, accelerator) -> None:
        """Makes the optimizer and wraps the discriminator for several processes."""
        if self.optimizer is not None:
            return
        self.accelerator = accelerator
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.pair.parameters() if parameter.requires_grad],
            lr=self.args.discriminator_learning_rate,
            betas=(self.args.discriminator_adam_beta1, self.args.discriminator_adam_beta2),
            weight_decay=self.args.discriminator_weight_decay,
        )
        if accelerator.distributed_type == DistributedType.FSDP:  # shards the generator; this one stays whole
            self.pair.forward = accelerator.autocast()(self.pair.forward)
            self.wrapped = DistributedDataParallel(self.pair, broadcast_buffers=False)
            self.optimizer = accelerator.prepare_optimizer(optimizer)
        else:
            self.wrapped, self.optimizer = accelerator.prepare(self.pair, optimizer)

    def prepare_schedule(self, num_training_steps: int) -> None:
        """Makes the schedule, over the steps in which the discriminator learns."""
        name = self.args.discriminator_lr_scheduler_type
        same = name == self.args.lr_scheduler_type
        self.scheduler = get_scheduler(
            name,
            self.optimizer.optimizer,
            num_warmup_steps=self.args.discriminator_warmup_steps,
            num_training_steps=max(1, num_training_steps - self.args.discriminator_start_step),
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs if same else None,
        )

    def learns(self, step: int) -> bool:
        """Whether the discriminator is trained in the step that follows `step` others."""
        return step >= self.args.discriminator_start_step

    def generator_loss(self, fake: torch.Tensor) -> torch.Tensor:
        """The generator's term for (B, 3, H, W) reconstructions; only they get a gradient. Under --bf16 the
        discriminator runs in bf16, as where it learns."""
        self.pair.requires_grad_(False)
        self.pair.eval()  # spectral norms as they are
        fake = self._augmented(fake)
        with self.accelerator.autocast():
            logits = self.pair.discriminator(fake)
        loss = self.generator_criterion(logits.float())
        for parameter in self._trainable():
            parameter.requires_grad_(True)
        return loss

    def _trainable(self) -> list[nn.Parameter]:
        return [p for name, p in self.pair.named_parameters() if ".backbone." not in name]

    def _augmented(self, pixels: torch.Tensor) -> torch.Tensor:
        return augment(pixels, self.args.discriminator_cutout) if self.args.discriminator_augment else pixels

    def backward(self, real: torch.Tensor, fake: torch.Tensor, accumulation_steps: int) -> dict[str, torch.Tensor]:
        """Adds the gradient of the discriminator's loss on a micro-batch.

        Args:
            real, fake: (B, 3, H, W), nominally in [0, 1]; no gradient reaches them.
            accumulation_steps: micro-batches in this step.

        Returns:
            Its loss and mean logits by name, for the log.
        """
        real, fake = real.detach(), fake.detach()
        if self.pair.discriminator.rounds_fakes:  # pixels between or beyond those of a file would give every fake away
            fake = fake.clamp(0, 1).mul(255).round().div(255)
        self.wrapped.train()
        last = self.accelerator.sync_gradients
        with contextlib.nullcontext() if last else getattr(self.wrapped, "no_sync", contextlib.nullcontext)():
            logits = self.wrapped(self._augmented(real), self._augmented(fake))
            real_logits, fake_logits = (part.float() for part in logits)
            loss = self.criterion(real_logits, fake_logits)
            means = torch.stack([real_logits.detach().mean(), fake_logits.detach().mean()])
            terms = {"discriminator": loss.detach()}
            if self.args.lecam_weight:
                terms["lecam"] = lecam(real_logits, fake_logits, *self.pair.averages)
                loss = loss + self.args.lecam_weight * terms["lecam"]
                terms["lecam"] = terms["lecam"].detach()
                if self._next_averages is None:
                    self._next_averages = self.pair.averages.clone()
                means_of_all = self.accelerator.reduce(means, reduction="mean")
                self._next_averages.lerp_(means_of_all, 1 - self.average_decay)
            self.accelerator.backward(loss / accumulation_steps)
        return {
            **{f"loss_{name}": term for name, term in terms.items()},
            "logits_real": means[0],
            "logits_fake": means[1],
        }

    def clip(self) -> torch.Tensor:
        """Clips the gradient and returns its norm from before."""
        return torch.nn.utils.clip_grad_norm_(self._trainable(), self.args.discriminator_max_grad_norm or math.inf)

    def step(self) -> None:
        """Applies the gradient."""
        self.optimizer.step()
        self.scheduler.step()
        if self._next_averages is not None:
            self.pair.averages.copy_(self._next_averages)
        self.discard()

    def discard(self) -> None:
        """Forgets the gradient of this step, and its logits."""
        self.pair.zero_grad()
        self._next_averages = None

    def save_weights(self, folder: str) -> None:
        tensors = {name: tensor for name, tensor in self.pair.state_dict().items() if ".backbone." not in name}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, os.path.join(folder, WEIGHTS))

    def save(self, folder: str) -> None:
        """Writes weights, optimizer and schedule into a checkpoint."""
        self.save_weights(folder)
        state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        torch.save(state, os.path.join(folder, STATE))

    def load(self, folder: str) -> None:
        """Reads what `save` wrote.

        Raises:
            ValueError: the checkpoint has no discriminator, or another one.
        """
        self._load_weights(os.path.join(folder, WEIGHTS))
        state = torch.load(os.path.join(folder, STATE), map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])

    def _load_weights(self, path: str) -> None:
        if not os.path.isfile(path):
            raise ValueError(f"There is no discriminator in {path}. Resume with the options of the run that wrote it.")
        tensors = load_file(path)
        own = {name for name in self.pair.state_dict() if ".backbone." not in name}
        if own != tensors.keys():
            different = sorted(own ^ tensors.keys())[:3]
            raise ValueError(f"{path} holds another discriminator than '{self.args.discriminator}': {different}.")
        self.pair.load_state_dict(tensors, strict=False)
