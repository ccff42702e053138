#!/usr/bin/env python
"""Trains an image tokenizer: a VQRAE, or one of the SimVQ paper's own.

    python train_hf.py configs/quickstart.json
    python train_hf.py --encoder_name_or_path facebook/dinov2-base --image_size 224 --train_data my_images \\
        --output_dir runs/stage1 --max_steps 20000 --per_device_train_batch_size 32 --learning_rate 4e-4
    python train_hf.py --stage 2 --model_name_or_path runs/stage1 --train_data my_images --gan_weight 0.1 \\
        --output_dir runs/stage2 --max_steps 20000 --per_device_train_batch_size 32 --learning_rate 1e-4

Options may also stand in one JSON or YAML file, and flags behind it override what it says; configs/ has the published
recipes. The options of transformers' TrainingArguments work: --bf16, --gradient_accumulation_steps, --report_to
tensorboard, --resume_from_checkpoint, --push_to_hub, ...; `accelerate launch train_hf.py ...` for several processes
(DDP, or FSDP with --config_file configs/accelerate_fsdp.yaml before the script; DeepSpeed is refused).

In the log, eval_loss lacks the terms of a GAN and of distillation that loss has: eval_psnr and eval_ssim tell progress.
"""

import shlex
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import IterableDataset
from transformers import set_seed

from configuration_simvq import VQRAEConfig
from eval.commands import ends_in_one_line
from eval.files import write_whole
from modeling_simvq import ImageTokenizer, VQRAEModel
from reading.files import dataset_of_files
from reading.models import cannot_be_loaded, check_fields, load_pretrained, load_processor
from reading.sources import Source, find_source, load_images
from reading.wording import counted
from training.arguments import VQRAETrainingArguments, parse_model_config
from training.card import Provenance, write_recipe
from training.data import (
    EvalTransform,
    TrainTransform,
    collate,
    readable_images,
    sample_indices,
    split_files,
    split_rows,
    with_pixels,
)
from training.hub import find_checkpoint, on_main_process
from training.options import (
    BATCH_SIZES,
    parse,
    refuse_without_effect,
    rules_of_data,
    rules_of_encoder,
    rules_of_model,
    rules_of_training,
)
from training.report import write_report
from training.resuming import finished, refuse_another_run
from training.trainer import VQRAETrainer


HELD_OUT = "heldout_images.txt"  # in --output_dir, paths of the images of --train_data that were held out


@dataclass
class ModelArguments:
    """Which model to train. Give --encoder_name_or_path, --model_name_or_path, or --model_config alone."""

    encoder_name_or_path: str | None = field(
        default=None, metadata={"help": "A pretrained vision encoder (hub or folder): a new tokenizer on top of it."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A VQRAE or SimVQ-GAN (hub or folder) to go on with."}
    )
    model_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "Fields of VQRAEConfig, as JSON or in a JSON file. Alone: a model from random weights. With an "
            'encoder or a model: overrides of its fields, such as {"codebook_size": 4096}. {} behind a recipe drops '
            "those of the recipe."
        },
    )
    codebook_init: str | None = field(
        default=None,
        metadata={
            "help": "Where the codes of a new model start: kmeans fits them to latents of training images, which takes "
            "a while and keeps them in use; gaussian is the SimVQ reference's, which collapses on the features of an "
            "encoder. Default: kmeans, but gaussian behind a learnable projection (codebook_dim without pixel_weight)."
        },
    )
    stage: int | None = field(
        default=None,
        metadata={
            "help": "1: the encoder is frozen. 2, after a stage 1 (--model_name_or_path): the encoder is trained too, "
            "and distillation keeps it near what it was. Default: as the model's freeze_encoder says (frozen)."
        },
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels (default: what the encoder or config says)."}
    )
    revision: str | None = field(
        default=None,
        metadata={
            "help": "Branch, tag or commit of --encoder_name_or_path or --model_name_or_path on the hub. For datasets: "
            "--dataset_revision; for a checkpoint: --resume_from_checkpoint org/name@revision."
        },
    )
    token: str | None = field(
        default=None,
        metadata={
            "help": "Token for all that is read from the hub, and for pushes without --hub_token. Default: that of `hf "
            "auth login`."
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flash_attention_2."})
    license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the resulting weights for the model card, e.g. apache-2.0 (default: the model's)."
        },
    )
    card_notes: str | None = field(
        default=None,
        metadata={"help": "A Markdown file for the model card: where the images are from, under which licences, ..."},
    )

    def __post_init__(self):
        self.model_config = parse_model_config(self.model_config)
        if self.encoder_name_or_path and self.model_name_or_path:
            raise ValueError("Pass --encoder_name_or_path or --model_name_or_path, not both.")
        if not (self.encoder_name_or_path or self.model_name_or_path or self.model_config):
            raise ValueError("Pass --encoder_name_or_path, --model_name_or_path or --model_config.")
        if self.card_notes and not Path(self.card_notes).is_file():
            raise ValueError(f"card_notes: there is no file {self.card_notes}.")
        if self.stage not in (None, 1, 2):
            raise ValueError(f"stage must be 1 or 2, got {self.stage}.")


@dataclass
class DataArguments:
    """Which images to train on and to hold out."""

    train_data: str = field(
        metadata={
            "help": "A folder of images, a .txt file that lists them, tars (WebDataset), parquet files, a zip, a "
            "folder of save_to_disk, or a dataset of the hub (docs/data.md)."
        }
    )
    eval_data: str | None = field(
        default=None,
        metadata={
            "help": "Held-out images, named likewise. Default: --eval_split where there are splits, else a part of "
            "--train_data."
        },
    )
    holdout: float = field(
        default=0.1,
        metadata={
            "help": "Without --eval_data, and without splits: share of the images to hold out, by groups "
            "(--group_separator)."
        },
    )
    group_separator: str | None = field(
        default=None,
        metadata={
            "help": "Files whose names agree up to this text are one group, and are held out together: '-' for a-1.png "
            "and a-2.png."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on, of a source that has several."})
    eval_split: str = field(
        default="validation", metadata={"help": "Split to evaluate on, of a source that has several."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images (default: told from types and usual names)."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Train on tars, parquet files or a hub dataset as they are read (needs --max_steps)."},
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Images in the shuffle buffer when streaming."})
    min_crop_area: float = field(
        default=0.3, metadata={"help": "Smallest area of a random crop, as a share of the image."}
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={
            "help": "Train on that many images at most, drawn by --seed; of a stream, the first after its shuffle."
        },
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Evaluate on that many of the held-out images at most, drawn the same way in every run."},
    )
    max_unreadable_share: float = field(
        default=0.01,
        metadata={
            "help": "Training images that cannot be read are replaced and listed. The run stops when they are more "
            "than 10 plus this share of the images that a process has seen, or when none can be read."
        },
    )

    def __post_init__(self):
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must be between 0 and 1, got {self.holdout}.")
        if not 0 < self.min_crop_area <= 1:
            raise ValueError(f"min_crop_area must be in (0, 1], got {self.min_crop_area}.")
        if not 0 <= self.max_unreadable_share <= 1:
            raise ValueError(f"max_unreadable_share must be in [0, 1], got {self.max_unreadable_share}.")
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}: leave it out for all images.")

    @cached_property
    def train_source(self) -> Source:
        return find_source(self.train_data)

    @cached_property
    def eval_source(self) -> Source:
        return find_source(self.eval_data) if self.eval_data else self.train_source


def load_model(args: ModelArguments, hub: dict) -> ImageTokenizer:
    """The model to train; `hub` holds the `revision` and `token` that were given."""
    config = dict(args.model_config or {})
    if args.image_size is not None:
        config["image_size"] = args.image_size
    if args.stage is not None:
        config["freeze_encoder"] = args.stage == 1
    if not args.model_name_or_path and config.get("use_simvq", True):
        default = "gaussian" if config.get("codebook_dim") and not config.get("pixel_weight") else "kmeans"
        config.setdefault("codebook_init", args.codebook_init or default)
    if not args.model_name_or_path:
        check_fields(VQRAEConfig, config, "A new model")
    name = args.encoder_name_or_path or args.model_name_or_path
    try:
        if args.encoder_name_or_path:
            print(f"Loading the encoder {name} (downloaded if it is on the hub and not cached).", flush=True)
            model = VQRAEModel.from_encoder_pretrained(name, hub, **config)
        elif args.model_name_or_path:
            print(f"Loading the tokenizer {name} (downloaded if it is on the hub and not cached).", flush=True)
            model = load_pretrained(name, config, hub)
        else:
            model = VQRAEModel(VQRAEConfig(**config))
    except OSError as error:  # some of transformers' do not say what they are about
        raise OSError(cannot_be_loaded(name, error) if name else str(error)) from error
    if args.attn_implementation:
        model.set_attn_implementation(args.attn_implementation)
    return model


def evaluation_command(args: DataArguments, output_dir: str) -> str | None:
    """The command that measures a finished run on what was held out; `None`: on rows that no option names."""
    source, flags = args.eval_source, []
    if args.eval_data or source.has_splits:
        data = args.eval_data or args.train_data
        if source.has_splits:
            flags = ["--split", args.eval_split]
        for name in ("dataset_config_name", "image_column"):
            if getattr(args, name) and not source.images:
                flags += [f"--{name}", getattr(args, name)]
    elif source.images:
        data = Path(output_dir) / HELD_OUT
    else:
        return None
    flags = ["--model_name_or_path", output_dir, "--data", str(data), *flags]
    return shlex.join(["python", "-m", "eval.reconstruction", *flags, "--output_dir", f"{output_dir}/evaluation"])


def say_how_to_evaluate(args: DataArguments, output_dir: str) -> None:
    if command := evaluation_command(args, output_dir):
        print(f"To measure it on images that were held out:\n{command}")


def load_data(args: DataArguments, training_args: VQRAETrainingArguments, skipped_list: Path, token: str | None = None):
    """Training and held-out datasets with a column `image`. A held-out part of files is listed in a file; unreadable
    held-out images are left out, and listed in another."""
    options = {"config_name": args.dataset_config_name, "image_column": args.image_column}
    options |= {"revision": args.dataset_revision, "token": token}
    source, listing, held_out = args.train_source, None, None
    if args.eval_data or source.has_splits:
        train = load_images(source, args.train_split, streaming=args.streaming, **options)
        eval_files = args.eval_source.images
        if not eval_files:
            held_out = load_images(args.eval_source, args.eval_split, **options)
    elif source.images:
        train_files, eval_files = split_files(source.images, args.holdout, args.group_separator)
        train = load_images(replace(source, images=train_files))
        listing = Path(training_args.output_dir) / HELD_OUT
    else:
        if args.streaming:
            raise ValueError(f"--streaming needs --eval_data: no part of {source.name} can be held out of a stream.")
        rows, eval_files = load_images(source, args.train_split, **options), []
        train, held_out = (rows.select(part) for part in split_rows(len(rows), args.holdout))
        if training_args.process_index == 0:
            print(
                f"{counted(len(train), 'row')} of {source.name} to train on, {len(held_out)} held out, evenly spread."
            )
    if held_out is not None:
        if args.max_eval_samples:
            held_out = held_out.select(sample_indices(len(held_out), args.max_eval_samples, seed=0))
    else:
        chosen = sample_indices(len(eval_files), args.max_eval_samples or len(eval_files), seed=0)
        readable = [None]
        if training_args.process_index == 0:
            readable = [readable_images([eval_files[i] for i in chosen], skipped_list)]
        readable = broadcast_object_list(readable)[0]
        if not readable:
            raise ValueError(f"None of the held-out images can be read, see {skipped_list}; pass other --eval_data.")
        held_out = dataset_of_files(readable)
        unreadable = {eval_files[i] for i in chosen} - set(readable)
        listed = [file for file in eval_files if file not in unreadable]  # also what is held out and not evaluated
    if listing and training_args.process_index == 0:
        write_whole(listing, lambda path: path.write_text("".join(f"{file.resolve()}\n" for file in listed)))
        print(f"{counted(len(train_files), 'image')} to train on, {len(listed)} held out ({listing}).")
    streams = isinstance(train, IterableDataset)
    if streams:
        train = train.shuffle(seed=training_args.seed, buffer_size=args.shuffle_buffer)
        if training_args.process_index == 0:
            print(f"Random order: files, and images from a buffer of {args.shuffle_buffer:,} (--shuffle_buffer).")
    if args.max_train_samples:
        if streams:
            train = train.take(args.max_train_samples)
        else:
            train = train.select(sample_indices(len(train), args.max_train_samples, training_args.seed))
    return train, held_out


@ends_in_one_line(smaller=f"{BATCH_SIZES}, or --image_size")
def main() -> None:
    kinds = ModelArguments, DataArguments, VQRAETrainingArguments
    with ends_in_one_line(ValueError):  # transformers looks at options too
        (model_args, data_args, training_args), given, by_flags = parse(kinds, sys.argv[1:], __doc__)
    rules = [*rules_of_model(model_args), *rules_of_data(data_args), *rules_of_training(training_args)]
    refuse_without_effect(given, by_flags, rules)
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError("--streaming needs --max_steps: nobody knows how long a stream is.")
    token = model_args.token or training_args.hub_token
    training_args.hub_token = training_args.hub_token or token
    if model_args.stage == 2:  # VQRAE's
        if training_args.distillation_weight is None:
            training_args.distillation_weight = 1.0
        if training_args.encoder_learning_rate is None:
            training_args.encoder_learning_rate = 1e-5
    if data_args.streaming:  # each process reads its own part of the stream
        training_args.accelerator_config.dispatch_batches = False
    set_seed(training_args.seed)

    hub = {name: value for name, value in (("revision", model_args.revision), ("token", token)) if value}
    with ends_in_one_line(ValueError, ImportError):
        model = load_model(model_args, hub)
    refuse_without_effect(given, by_flags, rules_of_encoder(model.config.freeze_encoder))
    if model_args.model_name_or_path and not model.config.freeze_encoder and not training_args.distillation_weight:
        print(
            f"Warning: the encoder of {model_args.model_name_or_path} is trained, and nothing ties it to what it was: "
            "its codes and features can be lost in a few steps. --stage 1 freezes it, --stage 2 adds distillation."
        )
    output_dir, resume_from = training_args.output_dir, training_args.resume_from_checkpoint
    if not (resume_from and Path(resume_from).is_dir()):  # else that is asked for, whatever is in the folder
        on_main_process(lambda: refuse_another_run(output_dir, model.config, given))
        if said := on_main_process(lambda: finished(output_dir, training_args)):
            if training_args.process_index == 0:
                print(said)
                say_how_to_evaluate(data_args, output_dir)
            return PartialState().destroy_process_group()
    size = model.config.image_size
    processor = load_processor(model_args.model_name_or_path, size, hub)
    skipped_list = Path(training_args.output_dir) / "skipped_images.txt"
    with ends_in_one_line(ValueError):
        train, held_out = load_data(data_args, training_args, skipped_list, token)
    provenance = Provenance(
        encoder=model_args.encoder_name_or_path,
        parent=model_args.model_name_or_path,
        train_data=data_args.train_data,
        num_train_images=None if isinstance(train, IterableDataset) else len(train),
        recipe=given,
        license=model_args.license,
        notes=Path(model_args.card_notes).read_text() if model_args.card_notes else None,
        hub=hub,
    )
    crops = data_args.min_crop_area, training_args.seed, skipped_list, data_args.max_unreadable_share
    transform = TrainTransform(size, *crops)
    trainer = VQRAETrainer(
        model=model,
        args=training_args,
        train_transform=transform,
        provenance=provenance,
        train_dataset=with_pixels(train, transform),
        eval_dataset=with_pixels(held_out, EvalTransform(processor)),
        data_collator=collate,
        processing_class=processor,
    )
    checkpoint = on_main_process(
        lambda: find_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir, token)
    )
    if trainer.is_world_process_zero():
        if checkpoint is None and (Path(training_args.output_dir) / "model.safetensors").exists():
            print(f"{training_args.output_dir} has a model and no checkpoint: training anew, the model is replaced.")
        others = write_recipe(provenance, training_args.output_dir)
        for line in others if checkpoint else []:
            print(f"Going on with another option than before, {line}.")
    if trainer.is_world_process_zero() and (said := trainer.loss_beside_eval_loss()):
        print(said)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(_internal_call=True)  # else it pushes, before there is anything to say in the card
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.create_model_card()
    if training_args.push_to_hub:
        if trainer.is_world_process_zero():
            print(f"Pushing to {trainer.hub_model_id}.", flush=True)
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        report = write_report(trainer.state.log_history, training_args.output_dir)
        weights = "averaged" if trainer.ema else "trained"
        print(f"Model ({weights} weights) and image processor: {training_args.output_dir}")
        print(f"Curves and pictures: {report}")
        if count := transform.count_skipped():
            print(f"{counted(count, 'image')} could not be read: {skipped_list}")
        say_how_to_evaluate(data_args, training_args.output_dir)
    trainer.save_state()
    PartialState().destroy_process_group()  # threads of the backend may abort a process that ends before they do


if __name__ == "__main__":
    main()
