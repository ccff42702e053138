"""What a run tells while it trains: terms of the loss, use of the codebook, metrics and pictures of held-out images."""

import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from eval.codebook_usage.codebook_usage import codebook_statistics, count_codes
from eval.metrics import CodebookWindow, to_uint8
from eval.pictures import save_rows
from eval.psnr.psnr import psnr_per_image
from eval.ssim.ssim import ssim_per_image
from training.data import TrainTransform
from training.pushing import PushingTrainer


logger = logging.get_logger(__name__)


class EvaluationMetrics:
    """`compute_metrics` for `batch_eval_metrics`: PSNR, SSIM, codebook utilization and perplexity in bounded memory.
    Keeps the first images of the pass for a picture."""

    def __init__(self, codebook_size: int, num_pictures: int) -> None:
        self.codebook_size = codebook_size
        self.num_pictures = num_pictures
        self._reset()
        self.pictures = None  # originals and reconstructions of the last complete pass

    def _reset(self) -> None:
        # Trainer hands every process the gathered batches: nothing to sum across processes
        self._sums, self._images, self._counts, self._pairs = {"psnr": 0.0, "ssim": 0.0}, 0, 0, []

    def __call__(self, prediction, compute_result: bool = False) -> dict[str, float]:
        reconstructions, tokens = (torch.as_tensor(x).cpu() for x in prediction.predictions)
        originals = torch.as_tensor(prediction.label_ids).cpu()
        missing = self.num_pictures - sum(len(pair[0]) for pair in self._pairs)
        if missing > 0:
            self._pairs.append((originals[:missing], reconstructions[:missing]))
        fake, real = to_uint8(reconstructions) / 255, to_uint8(originals) / 255
        self._sums["psnr"] += psnr_per_image(fake, real).double().sum().item()
        self._sums["ssim"] += ssim_per_image(fake, real).double().sum().item()
        self._images += len(real)
        self._counts = self._counts + count_codes(tokens, self.codebook_size)
        if not compute_result:
            return {}
        metrics = {name: total / self._images for name, total in self._sums.items()}
        metrics |= codebook_statistics(self._counts)
        self.pictures = tuple(torch.cat(images) for images in zip(*self._pairs))
        self._reset()
        return metrics


class MeanTerms:
    """Means of numbers by name: a sum of each on its device, and how many there were."""

    def __init__(self) -> None:
        self._sums, self._counts = {}, {}

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """Scalars, which may be in a graph; every process adds those of the same names, in the same order."""
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0) + term.detach()
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, torch.Tensor]:
        return {name: total / self._counts[name] for name, total in self._sums.items()}


class MonitoringTrainer(PushingTrainer):
    """Trainer's log and evaluation, with every term by name, the codebook over the latest tokens, and pictures.

    Args:
        train_transform: of the training images, which knows what could not be read.
    """

    def __init__(self, model, args, train_transform: TrainTransform | None = None, **kwargs) -> None:
        kwargs.setdefault("compute_metrics", EvaluationMetrics(model.config.codebook_size, args.num_pictures))
        super().__init__(model=model, args=args, **kwargs)
        self.train_transform = train_transform
        self.terms = MeanTerms()
        self._window = CodebookWindow(model.config.codebook_size)
        self._collapse_reported = False
        self._last_log = None  # time and step

    def log(self, logs, start_time=None):
        if "loss" in logs and (terms := self.terms.means()):
            means = self.accelerator.reduce(torch.stack(list(terms.values())), reduction="mean")
            logs |= dict(zip(terms, means.tolist()))
            self.terms = MeanTerms()
            for group in self.optimizer.param_groups:
                if "name" in group:  # not those of an optimizer that was given
                    logs[f"learning_rate_{group['name']}"] = group["lr"]
            if self.adversary:
                logs["learning_rate_discriminator"] = self.adversary.optimizer.param_groups[0]["lr"]
            now, step = time.time(), self.state.global_step
            if self._last_log and step > self._last_log[1]:
                images = (step - self._last_log[1]) * self.args.train_batch_size * self.accelerator.num_processes
                images *= self.args.gradient_accumulation_steps
                logs["images_per_second"] = images / (now - self._last_log[0])
            self._last_log = now, step
            quantizer = self.accelerator.unwrap_model(self.model).quantizer
            counts = self._window.add(self.accelerator.reduce(quantizer.get_codebook_counts(), reduction="sum"))
            logs |= codebook_statistics(counts)
            self._report_collapse(logs)
            nonfinite = torch.tensor(quantizer.get_num_nonfinite(), device=self.accelerator.device)
            if nonfinite := self.accelerator.reduce(nonfinite, reduction="sum").item():
                logs["nonfinite_latents"] = nonfinite
            if self.nonfinite.count:
                logs["nonfinite_steps"] = self.nonfinite.count
            if self.train_transform and (skipped := self.train_transform.count_skipped()):
                logs["skipped_images"] = skipped
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
        model = self.accelerator.unwrap_model(self.model)
        # held-out tokens are counted by the metrics, not by the training log
        training_counts = model.quantizer.get_codebook_counts()
        with self.ema.applied() if self.ema else nullcontext():
            metrics = super().evaluate(*args, **kwargs)
        pictures = getattr(self.compute_metrics, "pictures", None)
        if pictures:
            if self.ema and self.ema.averages is not None:  # originals, raw, averaged; on all processes, for FSDP
                training, model.quantizer._cache = model.training, None  # codes of the averaged weights
                model.eval()
                with torch.no_grad():
                    raw = model(pictures[0].to(self.args.device), return_loss=False).decoded_pixel_values
                model.train(training)
                pictures = pictures[0], raw.cpu(), pictures[1]
            if self.is_world_process_zero():
                path = Path(self.args.output_dir) / "reconstructions" / f"step-{self.state.global_step:07d}.png"
                save_rows(pictures, path)
                self._show(path)
        model.quantizer._counts.copy_(training_counts)
        self._last_log = None  # evaluation is no training time
        return metrics

    def _show(self, path: Path) -> None:
        """Sends a picture to the trackers of --report_to that take pictures."""
        step = self.state.global_step
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                with Image.open(path) as picture:
                    callback.tb_writer.add_image("reconstructions", np.asarray(picture), step, dataformats="HWC")
        if "trackio" in self.args.report_to:
            import trackio

            trackio.log({"reconstructions": trackio.Image(str(path))}, step=step)
