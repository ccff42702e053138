"""A Trainer for VQRAE: its optimizers, the start of its codes, and its steps."""

import copy
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
import transformers
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from reading.wording import one_of_processes
from training.adversary import Adversary
from training.arguments import VQRAETrainingArguments
from training.card import Provenance
from training.checkpoints import SaveModelingCode
from training.data import TrainTransform, readable_rows
from training.ema import EMA
from training.losses import ReconstructionLoss, WithGradient, adaptive_weight
from training.monitoring import MonitoringTrainer
from training.nonfinite import NonfiniteSteps
from training.sharding import prepare_for_fsdp
from training.token_passes import tokenize_crops


logger = logging.get_logger(__name__)


# of transformers' Trainer, which promises nothing about them: those that the classes here override or call
PRIVATE_METHODS = (
    "_finish_current_push",
    "_get_output_dir",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_prepare_inputs",
    "_push_from_checkpoint",
    "_run_epoch",
    "_save",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
)


class EpochOfCrops(TrainerCallback):
    """Tells the transform of the training images which epoch it is; for a stream, whose epochs Trainer does not know,
    which pass."""

    def __init__(self, transform: TrainTransform) -> None:
        self.transform = transform
        self._epoch = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._epoch = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int((state.epoch or 0) + 1e-6)
        self._epoch = epoch if self._epoch is None else max(epoch, self._epoch + 1)
        self.transform.set_epoch(self._epoch)


class CropsToFit:
    """Batches of crops of the training images, the same ones whenever they are read.

    Args:
        trainer: has the images.
        count: crops for this process.
    """

    def __init__(self, trainer: "VQRAETrainer", count: int) -> None:
        self.trainer, self.count = trainer, count

    def __iter__(self) -> Iterator[torch.Tensor]:
        trainer, seen, passes = self.trainer, 0, 0
        torch.default_generator.manual_seed(trainer.args.seed + trainer.accelerator.process_index)
        title = one_of_processes("Crops for the codebook", trainer.accelerator.num_processes)
        progress = tqdm(total=self.count, desc=title, unit="crop", disable=not trainer.is_world_process_zero())
        with progress:
            while seen < self.count:
                passes, before = passes + 1, seen
                if trainer.train_transform:
                    trainer.train_transform.set_epoch(-passes)  # other crops in every pass, and not those of training
                for batch in trainer.get_train_dataloader():
                    pixels = batch["pixel_values"][: self.count - seen]
                    seen += len(pixels)
                    progress.update(len(pixels))
                    yield pixels
                    if seen >= self.count:
                        return
                if seen == before:
                    raise ValueError(
                        "The training images give no batch to fit the codes to: there are none, or fewer than a batch "
                        "with --dataloader_drop_last. Lower --per_device_train_batch_size."
                    )


class VQRAETrainer(MonitoringTrainer):
    """Trains an [`ImageTokenizer`], such as a [`VQRAEModel`], on `pixel_values`.

    The loss is `l1 + l2 + lpips + convnext + vq + distillation + gan`, weighted as the arguments say. One pass of the
    model serves generator and discriminator, and one backward pass of each loss network gives both its gradient and
    the adaptive weight. Logs every term, and the utilization and perplexity of the codebook over the latest tokens
    (`CodebookWindow`), from counts summed over all processes. Where the model's `codebook_init` is "kmeans" and its
    codes have not been fitted, `train` does that first.

    What is evaluated and saved as the model are the averaged weights ([`EMA`]), unless `ema_decay` is 0; the weights
    that are trained are beside them in `raw_weights.safetensors`.
    """

    loss_is_scaled_for_ga = False  # each micro-batch gives its own mean

    def __init__(
        self,
        model,
        args: VQRAETrainingArguments,
        train_transform: TrainTransform | None = None,
        provenance: Provenance | None = None,
        **kwargs,
    ) -> None:
        if missing := [name for name in PRIVATE_METHODS if not hasattr(Trainer, name)]:
            raise RuntimeError(
                f"transformers {transformers.__version__} has no Trainer.{', Trainer.'.join(missing)}, on which this "
                "trainer builds: install the version that it was written for, transformers 5.24."
            )
        if args.n_gpu > 1:  # transformers would use DataParallel, whose replicas have no parameters
            raise ValueError(
                f"{args.n_gpu} GPUs and one process: start with `accelerate launch train_hf.py ...` to use all, or "
                "set CUDA_VISIBLE_DEVICES=0 to use one."
            )
        super().__init__(model, args, train_transform, **kwargs)
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed is not supported: `accelerate launch --multi_gpu` (DDP) and FSDP are.")
        self.add_callback(SaveModelingCode())
        if getattr(model.config, "pixel_weight", None) and model.config.freeze_encoder:  # they stay as fitted
            for projection in (model.project_in, model.project_out):
                projection.requires_grad_(args.train_projections)
        if args.token_passes:
            self._check_token_passes()
            model.quantizer.requires_grad_(False)  # other codes would need other tokens
        self.provenance = provenance or Provenance()
        if train_transform:
            self.add_callback(EpochOfCrops(train_transform))
        self.reconstruction_loss = self._build_reconstruction_loss().to(args.device)
        self.adversary = Adversary(args) if args.gan_weight else None
        self.ema = EMA(model, args.ema_decay) if args.ema_decay else None
        if self.ema:
            self.add_callback(self.ema)
        self.teacher = None
        if args.distillation_weight and not model.config.freeze_encoder:
            self.teacher = copy.deepcopy(model)
            self.teacher.config.freeze_encoder = True
            self.teacher.quantizer = self.teacher.decoder = None
            self.teacher.requires_grad_(False).eval().to(args.device)
        layers = getattr(model.config, "encoder_layers", None)
        if layers and not self.teacher and max(layers) < model.config.encoder_config.num_hidden_layers:
            args.ddp_find_unused_parameters = True  # the layers behind have no gradient
        if self.is_fsdp_enabled:
            prepare_for_fsdp(model, self.accelerator, args)
        self.nonfinite = NonfiniteSteps(self)
        self.add_callback(self.nonfinite)
        self._micro_batch = None  # what compute_loss was given, and its reconstructions

    def _check_token_passes(self) -> None:
        """Tokens that are computed once are those of every step only where nothing in front of them is trained. W and
        b of SimVQ need not be: k-means is a fixed point of the quantizer's loss, see `SimVQ.fit`."""
        model, reason = self.model, None
        if not model.config.freeze_encoder:
            reason = "the encoder is trained (stage 2)"
        elif any(parameter.requires_grad for parameter in model.project_in.parameters()):
            reason = "a projection in front of the quantizer is trained (codebook_dim, or --train_projections)"
        elif model.config.codebook_init != "kmeans" and model.config.codebook_init_latents is None:
            reason = "the codes are not fitted to latents (codebook_init is not kmeans), they would stay as they are"
        elif not isinstance(self.train_dataset, datasets.Dataset) or self.train_transform is None:
            reason = "the training images are a stream, or come without a TrainTransform"
        elif self.accelerator.num_processes > 1:
            reason = f"there are {self.accelerator.num_processes} processes, and tokens are computed by one"
        if reason:
            raise ValueError(f"token_passes cannot be used: {reason}. Leave it out, and encoder and quantizer run.")

    def _build_reconstruction_loss(self) -> ReconstructionLoss:
        """On every process the same terms: where one cannot have the weights, none uses them."""
        args = self.args
        weights = args.l1_weight, args.l2_weight, args.lpips_weight, args.lpips_network, args.convnext_weight
        error, loss = None, None
        if (args.lpips_weight or args.convnext_weight) and self.is_world_process_zero():
            print("Loading the networks of the loss (downloaded if they are not in $TORCH_HOME).", flush=True)
        with self.accelerator.local_main_process_first():  # which downloads
            try:
                loss = ReconstructionLoss(*weights, args.perceptual_weights, args.gradient_weight)
            except RuntimeError as caught:
                error = caught
        errors = [str(error) if error else None]
        if self.accelerator.num_processes > 1:
            errors = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(errors, str(error) if error else None)
        if not any(errors):
            return loss
        message = next(text for text in errors if text)
        if not args.perceptual_optional or not (args.l1_weight or args.l2_weight):
            raise RuntimeError(message) from error
        logger.warning(f"{message} --perceptual_optional is set: training without LPIPS and ConvNeXt-S.")
        return ReconstructionLoss(
            args.l1_weight, args.l2_weight, 0.0, args.lpips_network, gradient_weight=args.gradient_weight
        )

    # Optimizers ------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model=None):
        """Trainer's, in groups named decoder, quantizer and encoder with learning rates of their own; and the
        adversary's."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created:
            model, part = self.accelerator.unwrap_model(self.model), {}
            fused = getattr(model.config, "pixel_weight", None) is not None
            for name, parameter in model.named_parameters():
                of = name.split(".")[0] if name.startswith(("encoder.", "quantizer.")) else "decoder"
                # fitted to the encoder, it moves with it, as slowly
                part[id(parameter)] = "encoder" if fused and name.startswith("project_in.") else of
            base = self.args.learning_rate
            rates = {"decoder": base, "quantizer": base * self.args.quantizer_lr_multiplier}
            encoder = self.args.encoder_learning_rate
            rates["encoder"] = base if encoder is None else encoder
            groups = list(optimizer.param_groups)
            optimizer.param_groups.clear()
            for name, rate in rates.items():
                for group in groups:
                    parameters = [p for p in group["params"] if part[id(p)] == name]
                    if parameters:
                        optimizer.add_param_group({**group, "params": parameters, "lr": rate, "name": name})
        if self.adversary:
            self.adversary.prepare(self.accelerator)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.adversary:
            self.adversary.prepare_schedule(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    # Starting and resuming -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if self.args.token_passes:  # each of its images has tokens: there can be no other in its place
            self.train_dataset = readable_rows(self.train_dataset, self.train_transform)
        config = self.accelerator.unwrap_model(self.model).config
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if checkpoint:
            saved = type(config).from_pretrained(checkpoint)
            for name in ("codebook_init", "codebook_init_latents", "latents_fit"):
                if hasattr(config, name):
                    setattr(config, name, getattr(saved, name))
        elif not resume_from_checkpoint and config.codebook_init == "kmeans" and config.codebook_init_latents is None:
            self.initialize_codebook()
        self._check_codebook()
        if self.args.token_passes:
            if checkpoint:
                self._load_from_checkpoint(checkpoint)  # the codes that the run started with
            self.train_dataset = tokenize_crops(
                self.model.to(self.args.device),
                self.train_dataset,
                self.train_transform,
                self.args.token_passes,
                Path(self.args.output_dir) / "tokens",
                self.args.eval_batch_size,
                self.args.dataloader_num_workers,
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def loss_beside_eval_loss(self) -> str | None:
        """What is to be said where `loss` and `eval_loss` of the log are not of the same terms; `None`: they are."""
        terms = [name for name, part in (("gan", self.adversary), ("distillation", self.teacher)) if part]
        lacks = f"eval_loss lacks {' and '.join(terms)}, which loss has" if terms else ""
        if self.args.token_passes:
            lacks += f"{', and ' if lacks else ''}eval_loss has vq, which loss lacks"
        return f"In the log, {lacks}: compare neither with the other; eval_psnr tells progress." if lacks else None

    def _check_codebook(self) -> None:
        """Every process must have the same codebook: it is frozen, so nothing would ever make them agree. With FSDP
        the same weights: each process keeps its part of its own.

        Raises:
            RuntimeError: they have not.
        """
        if self.accelerator.num_processes == 1:
            return
        model = self.accelerator.unwrap_model(self.model)
        tensors = model.state_dict().values() if self.is_fsdp_enabled else [model.quantizer.embedding.weight]
        digest = hashlib.sha256()
        for tensor in tensors:
            if not isinstance(tensor, DTensor):  # sharded by an earlier call
                digest.update(tensor.detach().cpu().float().numpy().tobytes())
        digests = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(digests, digest.hexdigest())
        if len(set(digests)) > 1:
            what = "weights" if self.is_fsdp_enabled else "codebooks"
            raise RuntimeError(
                f"The processes have different {what} ({', '.join(x[:8] for x in digests)}): build the model from "
                "the same checkpoint, or after set_seed, on each of them."
            )

    def initialize_codebook(self) -> None:
        """Fits the codes, and what else the model has to fit, to crops of the training images, see
        [`VQRAEModel.initialize_codebook`]: `codebook_init_images` of them, or 32 latents a code, and for few codes up
        to 256 (`benchmarks/collapse.py`)."""
        model = self.accelerator.unwrap_model(self.model).to(self.args.device)  # FSDP's is not there yet
        codes, count = model.config.codebook_size, self.accelerator.num_processes
        size = self.train_transform.image_size if self.train_transform else model.config.image_size
        latents = (size // model.config.decoder_patch_size) ** 2
        crops = self.args.codebook_init_images
        if crops is None:
            crops = math.ceil(max(32, min(256, 2**18 // codes)) * codes / latents)
        crops = CropsToFit(self, math.ceil(crops / count))
        if self.is_world_process_zero():
            known = isinstance(self.train_dataset, datasets.Dataset)
            each = f", {crops.count * count / len(self.train_dataset):.1f} of each image" if known else ""
            print(
                f"k-means for {codes:,} codes: {crops.count * count * latents:,} latents of {crops.count * count:,} "
                f"crops{each} are read and encoded, and then clustered.",
                flush=True,
            )
        state = torch.random.get_rng_state()
        model.initialize_codebook(crops, math.ceil(crops.count * count * latents / codes), seed=self.args.seed)
        torch.random.set_rng_state(state)

    # Steps -----------------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        (inputs, reconstruction), self._micro_batch = self._micro_batch, None
        self.nonfinite.see(loss, inputs)
        if self.adversary and self.adversary.learns(self.state.global_step):
            accumulated = self.current_gradient_accumulation_steps
            self.terms.add(self.adversary.backward(inputs["pixel_values"], reconstruction, accumulated))
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixels = inputs["pixel_values"]
        outputs = model(pixels, image_tokens=inputs.get("image_tokens"), return_loss=False)
        reconstruction = outputs.decoded_pixel_values
        if not torch.is_grad_enabled():
            loss, _ = self.reconstruction_loss(reconstruction, pixels)
            if outputs.embedding_loss is not None:
                loss = loss + self.args.vq_weight * outputs.embedding_loss
            return (loss, outputs) if return_outputs else loss

        # The graph is cut at the pixels: a loss network gives its gradient there and then lets go of its activations,
        # before the model's own backward pass; and the adaptive weight needs no second pass through it.
        leaf = reconstruction.detach().requires_grad_()
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0  # fp16: small gradients

        def gradient(value):
            return torch.autograd.grad(value * scale, leaf)[0] / scale

        loss, terms = self.reconstruction_loss(leaf, pixels)
        direction = gradient(loss)
        loss = loss.detach()
        if self.adversary and self.state.global_step >= self.args.gan_start_step:
            adversarial = self.adversary.generator_loss(leaf)
            adversarial_direction = gradient(adversarial)
            weight = self.args.gan_weight
            if self.args.gan_adaptive:
                last_layer = self.accelerator.unwrap_model(model).last_layer
                ratio = adaptive_weight(reconstruction, last_layer, direction, adversarial_direction)
                self.terms.add({"adaptive_weight": ratio})
                weight = weight * ratio
            direction = direction + weight * adversarial_direction
            loss = loss + weight * adversarial.detach()
            terms["gan"] = adversarial
        loss = WithGradient.apply(reconstruction, loss, direction)
        if outputs.embedding_loss is None:  # the tokens were known
            self.accelerator.unwrap_model(model).quantizer.count_codes(outputs.image_tokens)
        else:
            loss = loss + self.args.vq_weight * outputs.embedding_loss
            terms["vq"] = outputs.embedding_loss
        if self.teacher:
            with torch.no_grad(), self.accelerator.autocast():
                # a step with pixels that are no numbers is skipped behind its gradients; the teacher would refuse them
                target = self.teacher.get_image_features(pixels.nan_to_num()).last_hidden_state
            terms["distillation"] = F.mse_loss(outputs.last_hidden_state.float(), target.float())
            loss = loss + self.args.distillation_weight * terms["distillation"]
        self.terms.add({f"loss_{name}": term for name, term in terms.items()})
        self._micro_batch = inputs, reconstruction.detach()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), (outputs.decoded_pixel_values, outputs.image_tokens), inputs["pixel_values"]
