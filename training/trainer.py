"""A Trainer for VQRAE: its losses by name, the codebook watched, pictures at each evaluation."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.dynamic_module_utils import custom_object_save

from eval.metrics import CodebookUsage, codebook_statistics, pixel_metrics, to_uint8
from eval.pictures import save_pairs
from training.losses import ReconstructionLoss


@dataclass
class VQRAETrainingArguments(TrainingArguments):
    """`TrainingArguments` with the losses of VQRAE and defaults that suit images."""

    l1_weight: float = field(default=0.0, metadata={"help": "Weight of the mean absolute pixel error."})
    l2_weight: float = field(default=1.0, metadata={"help": "Weight of the mean squared pixel error."})
    lpips_weight: float = field(
        default=1.1, metadata={"help": "Weight of LPIPS (VQRAE: 1.1). 0: off, and no weights of it are needed."}
    )
    lpips_network: str = field(default="vgg", metadata={"help": "Backbone of LPIPS: vgg or alex."})
    vq_weight: float = field(default=1.0, metadata={"help": "Weight of the quantizer's own loss."})
    num_pictures: int = field(default=16, metadata={"help": "Held-out images in the picture of each evaluation."})

    def __post_init__(self):
        super().__post_init__()
        self.remove_unused_columns = False  # pixels are made from the column `image` when an item is read
        self.label_names = ["pixel_values"]
        self.batch_eval_metrics = True
        if not (self.l1_weight or self.l2_weight or self.lpips_weight):
            raise ValueError("l1_weight, l2_weight and lpips_weight are all 0: nothing would train the decoder.")


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


class VQRAETrainer(Trainer):
    """Trains a [`VQRAEModel`] on `pixel_values`.

    The loss is `l1 + l2 + lpips + vq`, weighted as the arguments say. Logs every term, and the utilization and
    perplexity of the codebook over the tokens since the last log, from counts summed over all processes.
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
            logs |= codebook_statistics(self.accelerator.reduce(quantizer.get_codebook_counts(), reduction="sum"))
            if nonfinite := quantizer.get_num_nonfinite():
                logs["nonfinite_latents"] = nonfinite
            quantizer.reset_codebook_usage()
        super().log(logs, start_time)

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
