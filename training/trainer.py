"""A Trainer for VQRAE: its losses by name, the codebook watched, pictures at each evaluation."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from eval.metrics import CodebookUsage, codebook_statistics, pixel_metrics, to_uint8
from eval.pictures import save_pairs
from training.losses import ReconstructionLoss


logger = logging.get_logger(__name__)

LATENTS_PER_CODE = 32  # for the k-means of the codebook


@dataclass
class VQRAETrainingArguments(TrainingArguments):
    """`TrainingArguments` with the losses of VQRAE and defaults that suit images."""

    l1_weight: float = field(default=0.0, metadata={"help": "Weight of the mean absolute pixel error."})
    l2_weight: float = field(default=1.0, metadata={"help": "Weight of the mean squared pixel error."})
    lpips_weight: float = field(
        default=1.1, metadata={"help": "Weight of LPIPS (VQRAE: 1.1). 0: off, and no weights of it are needed."}
    )
    lpips_network: str = field(default="vgg", metadata={"help": "Backbone of LPIPS: vgg or alex."})
    quantizer_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of the quantizer, as a multiple of --learning_rate."}
    )
    vq_weight: float = field(default=1.0, metadata={"help": "Weight of the quantizer's own loss."})
    num_pictures: int = field(default=16, metadata={"help": "Held-out images in the picture of each evaluation."})

    def __post_init__(self):
        super().__post_init__()
        self.remove_unused_columns = False  # pixels are made from the column `image` when an item is read
        self.label_names = ["pixel_values"]
        self.batch_eval_metrics = True
        if not (self.l1_weight or self.l2_weight or self.lpips_weight):
            raise ValueError("l1_weight, l2_weight and lpips_weight are all 0: nothing would train the decoder.")
        if not self.quantizer_lr_multiplier >= 0:
            raise ValueError(f"quantizer_lr_multiplier must not be negative, got {self.quantizer_lr_multiplier}.")


class EvaluationMetrics:
    """`compute_metrics` for `batch_eval_metrics`: PSNR, SSIM, codebook utilization and perplexity in bounded memory.
    Keeps the first images of the pass for a picture."""

    def __init__(self, codebook_size: int, num_pictures: int) -> None:
        # Trainer hands every process the gathered batches: nothing to sum across processes
        self.pixels = pixel_metrics(sync_on_compute=False)
        self.usage = CodebookUsage(codebook_size, sync_on_compute=False)
        self.num_pictures = num_pictures
        self._pairs = []
        self.pictures = None  # originals and reconstructions of the last complete pass

    def __call__(self, prediction, compute_result: bool = False) -> dict[str, float]:
        reconstructions, tokens = (torch.as_tensor(x).cpu() for x in prediction.predictions)
        originals = torch.as_tensor(prediction.label_ids).cpu()
        missing = self.num_pictures - sum(len(pair[0]) for pair in self._pairs)
        if missing > 0:
            self._pairs.append((originals[:missing], reconstructions[:missing]))
        self.pixels.update(to_uint8(reconstructions) / 255, to_uint8(originals) / 255)
        self.usage.update(tokens)
        if not compute_result:
            return {}
        metrics = {name: value.item() for name, value in self.pixels.compute().items()} | self.usage.compute()
        self.pictures = tuple(torch.cat(images) for images in zip(*self._pairs))
        self._pairs = []
        self.pixels.reset(), self.usage.reset()
        return metrics


class SaveModelingCode(TrainerCallback):
    """Puts the modeling code beside the checkpoints, so that what is pushed in mid-training can be loaded: Trainer
    pushes config and weights alone."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            custom_object_save(model, args.output_dir, config=model.config)


class CodebookWindow:
    """Counts of the latest tokens of each code: at least the last 64 per code, once there have been as many, and fewer
    than twice that; in the memory of two counts.

    Args:
        codebook_size: number of codes.
    """

    tokens_per_code = 64

    def __init__(self, codebook_size: int) -> None:
        self._previous = torch.zeros(codebook_size, dtype=torch.int64)
        self._current = self._previous.clone()

    def add(self, counts: torch.Tensor) -> torch.Tensor:
        """Adds (codebook_size,) new counts and returns those of the window."""
        if self._current.sum() >= self.tokens_per_code * len(self._current):
            self._previous, self._current = self._current, torch.zeros_like(self._current)
        self._current += counts.cpu()
        return self._previous + self._current


class VQRAETrainer(Trainer):
    """Trains a [`VQRAEModel`] on `pixel_values`.

    The loss is `l1 + l2 + lpips + vq`, weighted as the arguments say. Logs every term, and the utilization and
    perplexity of the codebook over the latest tokens (`CodebookWindow`), from counts summed over all processes. Where
    the model's `codebook_init` is "kmeans" and its codes have not been fitted, `train` does that first.
    """

    loss_is_scaled_for_ga = False  # each micro-batch gives its own mean

    def __init__(self, model, args: VQRAETrainingArguments, **kwargs) -> None:
        kwargs.setdefault("compute_metrics", EvaluationMetrics(model.config.codebook_size, args.num_pictures))
        super().__init__(model=model, args=args, **kwargs)
        self.add_callback(SaveModelingCode())
        self.reconstruction_loss = ReconstructionLoss(
            args.l1_weight, args.l2_weight, args.lpips_weight, args.lpips_network
        ).to(args.device)
        self._terms = {}
        self._window = CodebookWindow(model.config.codebook_size)
        self._collapse_reported = False

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        if self.args.quantizer_lr_multiplier != 1:
            own = {id(p) for p in self.accelerator.unwrap_model(self.model).quantizer.parameters()}
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in own]
                group["params"] = [p for p in group["params"] if id(p) not in own]
                if moved:
                    rate = group["lr"] * self.args.quantizer_lr_multiplier
                    optimizer.add_param_group({**group, "params": moved, "lr": rate})
        return optimizer

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        config = self.accelerator.unwrap_model(self.model).config
        if resume_from_checkpoint:
            checkpoint = resume_from_checkpoint
            if checkpoint is True:
                checkpoint = get_last_checkpoint(self.args.output_dir)
            if checkpoint:  # else Trainer says that there is none
                saved = type(config).from_pretrained(checkpoint)
                config.codebook_init, config.codebook_init_latents = saved.codebook_init, saved.codebook_init_latents
        elif config.codebook_init == "kmeans" and config.codebook_init_latents is None:
            self.initialize_codebook()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Trainer copies tensors by their names in the file. Some names are only mapped to the modules' by
        `from_pretrained` (DINOv2's attention, for one), and its encoder would silently not be resumed."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype).state_dict())

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def initialize_codebook(self) -> None:
        """Fits the codes to crops of the training images, see [`VQRAEModel.initialize_codebook`]."""
        model = self.accelerator.unwrap_model(self.model)
        needed = math.ceil(LATENTS_PER_CODE * model.config.codebook_size / self.accelerator.num_processes)
        state = torch.random.get_rng_state()
        torch.manual_seed(self.args.seed + self.accelerator.process_index)
        progress = tqdm(
            total=needed, desc="Latents for the codebook", unit="latent", disable=not self.is_local_process_zero()
        )

        def batches():
            seen = 0
            while seen < needed:  # other crops in every round
                for batch in self.get_train_dataloader():
                    patches = batch["pixel_values"][0, 0].numel() // model.config.decoder_patch_size**2
                    latents = len(batch["pixel_values"]) * patches
                    progress.update(min(latents, needed - seen))
                    seen += latents
                    yield batch
                    if seen >= needed:
                        return

        with progress:
            model.initialize_codebook(batches(), LATENTS_PER_CODE, seed=self.args.seed)
        torch.random.set_rng_state(state)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixels = inputs["pixel_values"]
        outputs = model(pixels, return_loss=False)
        loss, terms = self.reconstruction_loss(outputs.decoded_pixel_values, pixels)
        loss = loss + self.args.vq_weight * outputs.embedding_loss
        if model.training:
            for name, term in {**terms, "vq": outputs.embedding_loss}.items():
                self._terms.setdefault(f"loss_{name}", []).append(term.detach())
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), (outputs.decoded_pixel_values, outputs.image_tokens), inputs["pixel_values"]

    def log(self, logs, start_time=None):
        if "loss" in logs and self._terms:
            for name, values in self._terms.items():
                logs[name] = self.accelerator.reduce(torch.stack(values).mean(), reduction="mean").item()
            self._terms = {}
            quantizer = self.accelerator.unwrap_model(self.model).quantizer
            counts = self._window.add(self.accelerator.reduce(quantizer.get_codebook_counts(), reduction="sum"))
            logs |= codebook_statistics(counts)
            self._report_collapse(logs)
            if nonfinite := quantizer.get_num_nonfinite():
                logs["nonfinite_latents"] = nonfinite
            quantizer.reset_codebook_usage()
        super().log(logs, start_time)

    def _report_collapse(self, logs) -> None:
        """A warning, once, when under a tenth of the codes are in use though there were tokens enough and warm-up is
        over."""
        enough = logs["codebook_tokens"] >= 8 * self.accelerator.unwrap_model(self.model).config.codebook_size
        warm = self.state.global_step >= self.args.get_warmup_steps(self.state.max_steps)
        if enough and warm and logs["codebook_utilization"] < 0.1 and not self._collapse_reported:
            self._collapse_reported = True
            if not self.is_world_process_zero():
                return
            logger.warning(
                f"The codebook has collapsed: {logs['codebook_utilization']:.1%} of the codes were used by the last "
                f"{logs['codebook_tokens']:,} tokens. Likely causes: codes that did not start on the latents (train "
                "with --codebook_init kmeans); a learning rate of the quantizer at which the codes shrink to a few "
                "hubs (lower --quantizer_lr_multiplier, longer --warmup_steps); use_simvq false; or images with less "
                "variety than there are codes."
            )

    def evaluate(self, *args, **kwargs):
        quantizer = self.accelerator.unwrap_model(self.model).quantizer
        training_counts = quantizer._counts  # held-out tokens are counted by the metrics, not by the training log
        quantizer._counts = None
        metrics = super().evaluate(*args, **kwargs)
        quantizer._counts = training_counts
        pictures = getattr(self.compute_metrics, "pictures", None)
        if pictures and self.is_world_process_zero():
            path = Path(self.args.output_dir) / "reconstructions" / f"step-{self.state.global_step:07d}.png"
            save_pairs(*pictures, path)
        return metrics
