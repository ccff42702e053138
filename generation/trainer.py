"""Training of a generator: stock transformers, with what it tells on the way."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eval.pictures import save_rows
from generation.rows import Collate, ImageSequences
from generation.sampling import generate_images
from generation.vocabulary import Vocabulary
from modeling_simvq import ImageTokenizer
from training.arguments import CommonTrainingArguments
from training.checkpoints import CheckpointingTrainer
from training.ema import EMA
from training.trainer import EpochOfCrops


@dataclass
class GeneratorTrainingArguments(CommonTrainingArguments):
    """`TrainingArguments` with defaults of ours that suit few images, and LlamaGen's where those are not touched (AdamW
    with beta 2 0.95, weight decay 0.05)."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Of AdamW (LlamaGen: 1e-4 at batches of 256)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The schedule of the learning rate."})
    warmup_steps: float = field(default=0.02, metadata={"help": "Steps of warm-up; below 1: a share of all steps."})
    weight_decay: float = field(default=0.05, metadata={"help": "Of AdamW (LlamaGen: 0.05)."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta 2 of AdamW (LlamaGen: 0.95)."})
    num_pictures: int = field(default=16, metadata={"help": "New images in the picture of each evaluation; 0: none."})
    picture_guidance: float = field(
        default=1.0, metadata={"help": "Guidance of the pictures of an evaluation; 1: none."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.label_names = ["labels"]
        self.prediction_loss_only = True
        if self.num_pictures < 0:
            raise ValueError(f"num_pictures must not be negative, got {self.num_pictures}.")


class GeneratorTrainer(CheckpointingTrainer):
    """Trains a language model on sequences of a [`Vocabulary`].

    Its loss is the mean of nats a token of images. Held-out rows are measured with the averaged weights; logged beside
    their loss are its perplexity and what models of mere frequencies have on the same rows. An evaluation paints new
    images (`samples/step-N.png`), where the tokenizer is there. Everything random comes from seeds and keys, so that a
    run that is killed and resumed ends as one that was not.

    Args:
        vocabulary: saved beside every checkpoint.
        frequencies: nats a token of other models on the held-out rows, by name.
        tokenizer: which paints; `None`: no pictures.
        picture_conditions: of the new images.
    """

    def __init__(
        self,
        model,
        args: GeneratorTrainingArguments,
        train_dataset: ImageSequences,
        vocabulary: Vocabulary,
        frequencies: dict[str, float] | None = None,
        tokenizer: ImageTokenizer | None = None,
        picture_conditions: list | None = None,
        **kwargs,
    ) -> None:
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, data_collator=Collate(vocabulary), **kwargs
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # new images are painted by one process alone
            raise ValueError(
                "FSDP and DeepSpeed are not supported for generators: start with `accelerate launch --multi_gpu` (DDP)."
            )
        self.vocabulary, self.frequencies = vocabulary, frequencies or {}
        self.tokenizer, self.picture_conditions = tokenizer, picture_conditions or []
        self.add_callback(EpochOfCrops(train_dataset.draws))
        self.ema = EMA(model, args.ema_decay) if args.ema_decay else None
        if self.ema:
            self.add_callback(self.ema)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.vocabulary.save(output_dir or self.args.output_dir)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs["perplexity"] = math.exp(min(logs["loss"], 700))
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700))
            logs |= {f"eval_loss_{name}": value for name, value in self.frequencies.items()}
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs):
        with self.ema.applied() if self.ema else nullcontext():
            metrics = super().evaluate(*args, **kwargs)
            if self.tokenizer and self.picture_conditions and self.is_world_process_zero():
                self._paint()
        self.accelerator.wait_for_everyone()
        return metrics

    def _paint(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        count = len(self.picture_conditions)
        guidance = self.args.picture_guidance
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            images = generate_images(
                model,
                self.vocabulary,
                self.tokenizer,
                self.picture_conditions,
                list(range(count)),
                guidance_scale=guidance,
            )
        model.train(training)
        save_rows([images], Path(self.args.output_dir) / "samples" / f"step-{self.state.global_step:07d}.png")
