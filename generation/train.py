#!/usr/bin/env python
"""Trains a generator of images, a stock LlamaForCausalLM, on a dataset of tokens.

    python -m generation.tokenize_images --help
    python -m generation.train --train_data runs/tokens --model_size B --output_dir runs/generator --max_steps 20000 \\
        --per_device_train_batch_size 32 --eval_strategy steps --eval_steps 1000 --save_steps 1000 --bf16
    python -m generation.sample --model_name_or_path runs/generator --num_images 16 --output_dir runs/samples

An image is [condition] + its tokens in raster order. An epoch has every image once, with one of its rows (crops, flips)
drawn by seed, epoch and key. The model is of transformers alone: AutoModelForCausalLM loads it without code of this
repository, and vocabulary.json beside it says which id is what.

Options may also stand in one JSON or YAML file, and flags behind it override what it says. The options of transformers'
TrainingArguments work: --bf16, --gradient_accumulation_steps, --eval_strategy, --resume_from_checkpoint, ...;
`accelerate launch -m generation.train ...` for several processes. A run that was interrupted goes on from its last
checkpoint when the same command is given again; one that is finished says so, and stays as it is.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import PartialState
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from eval.commands import ends_in_one_line
from eval.files import write_whole
from eval.results import library_versions
from generation.provenance import Provenance
from generation.rows import ImageSequences, frequency_models, grid_of, load_rows, split_keys
from generation.sampling import load_painter
from generation.trainer import GeneratorTrainer, GeneratorTrainingArguments
from generation.vocabulary import FILE, Vocabulary
from reading.models import check_fields
from reading.wording import counted, did_you_mean
from training.arguments import parse_model_config
from training.card import public_options
from training.hub import find_checkpoint, on_main_process
from training.options import BATCH_SIZES, Without, parse, refuse_without_effect, rules_of_trainer
from training.resuming import finished, refuse_another_run


# of LlamaGen (autoregressive/models/gpt.py), whose SwiGLU is 8/3 of the width, up to a multiple of 256
SIZES = {
    "B": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048},
    "L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 2816},
    "XL": {"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20, "intermediate_size": 3584},
    "XXL": {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 4096},
}


@dataclass
class GeneratorArguments:
    """Which model to train, and on what condition."""

    model_size: str = field(
        default="B", metadata={"help": "B, L, XL or XXL of LlamaGen: 111, 343, 775 million, 1.4 billion weights."}
    )
    model_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "Fields of LlamaConfig that override those of --model_size, as JSON or in a JSON file, such as "
            '{"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 688, '
            '"tie_word_embeddings": true}.'
        },
    )
    condition: str = field(
        default="auto",
        metadata={
            "help": "class (column label), text (column text), none, or auto: class where there are labels, text where "
            "there are texts and a --text_tokenizer, else none."
        },
    )
    condition_dropout: float = field(
        default=0.1,
        metadata={
            "help": "Share of images that come without their condition, which guidance needs. 0: no guidance later."
        },
    )
    text_tokenizer: str | None = field(
        default=None, metadata={"help": "For texts: a tokenizer of transformers (hub or folder), saved with the model."}
    )
    max_text_tokens: int = field(default=64, metadata={"help": "Longer texts are cut."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "The image tokenizer, which paints (hub or folder), if it is no longer where the tokens' "
            "provenance.json says; the model's vocabulary names this place then."
        },
    )

    def __post_init__(self):
        if self.model_size not in SIZES:
            meant = did_you_mean(self.model_size, SIZES) or "."
            raise ValueError(f"model_size must be one of {', '.join(SIZES)}, got '{self.model_size}'{meant}")
        self.model_config = parse_model_config(self.model_config)
        if self.condition not in ("auto", "class", "text", "none"):
            meant = did_you_mean(self.condition, ("auto", "class", "text", "none")) or "."
            raise ValueError(f"condition must be auto, class, text or none, got '{self.condition}'{meant}")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout must be in [0, 1), got {self.condition_dropout}.")
        if self.max_text_tokens < 1:
            raise ValueError(f"max_text_tokens must be at least 1, got {self.max_text_tokens}.")


@dataclass
class TokenArguments:
    """Which tokens to train on and to hold out."""

    train_data: str = field(metadata={"help": "The folder of a dataset of tokens (generation.tokenize_images)."})
    eval_data: str | None = field(
        default=None, metadata={"help": "Another one, held out. Default: a part of the images of --train_data."}
    )
    holdout: float = field(
        default=0.05, metadata={"help": "Without --eval_data: share of the images to hold out, with all their crops."}
    )

    def __post_init__(self):
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must be between 0 and 1, got {self.holdout}.")
        for name in ("train_data", "eval_data"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(
                    f"{name}: there is no folder {folder}; a dataset of tokens is made by `python -m "
                    "generation.tokenize_images`."
                )


def class_names(rows, provenance: Provenance) -> list[str]:
    """Of the classes, by their numbers; these themselves where they have no names."""
    names = provenance.label_names or getattr(rows.features["label"], "names", None)
    if names:
        return list(names)
    labels = rows.unique("label")
    if None in labels:
        raise ValueError("Some rows have no label: pass --condition none, or tokenize images that all have one.")
    return [str(number) for number in range(max(labels) + 1)]


def make_vocabulary(args: GeneratorArguments, rows, provenance: Provenance, whose: str, text_tokenizer) -> Vocabulary:
    """The ids for a dataset of tokens.

    Raises:
        ValueError: it has no such condition, or grids of several sizes.
    """
    columns, condition = rows.column_names, args.condition
    if condition == "auto":
        condition = "class" if "label" in columns else "text" if "text" in columns and text_tokenizer else "none"
    column = {"class": "label", "text": "text"}.get(condition)
    if column and column not in columns:
        raise ValueError(f"condition '{condition}': the tokens of {whose} have no column {column}.")
    if condition == "text" and text_tokenizer is None:
        raise ValueError("condition 'text' needs a --text_tokenizer, the name of one of transformers.")
    height, width = grid_of(rows, whose)
    return Vocabulary(
        codebook_size=provenance.codebook_size,
        height=height,
        width=width,
        condition=condition,
        tokenizer_hash=provenance.tokenizer_hash,
        model_name_or_path=args.tokenizer or provenance.model_name_or_path,
        revision=None if args.tokenizer else provenance.revision,
        class_names=class_names(rows, provenance) if condition == "class" else None,
        text_size=len(text_tokenizer) if condition == "text" else None,
        max_text_tokens=args.max_text_tokens if condition == "text" else None,
        has_null=condition == "none" or args.condition_dropout > 0,
    )


def make_model(args: GeneratorArguments, vocabulary: Vocabulary) -> LlamaForCausalLM:
    """A Llama with random weights.

    Raises:
        ValueError: a field that LlamaConfig does not have, or one that the vocabulary decides.
    """
    given = args.model_config or {}
    check_fields(LlamaConfig, given, "A generator")
    decided = {
        "vocab_size": vocabulary.size,
        "max_position_embeddings": vocabulary.max_prompt + vocabulary.num_tokens,
        "bos_token_id": None,
        "eos_token_id": None,  # 2 by default: code 2 would end images
        "pad_token_id": vocabulary.pad,
    }
    if both := sorted(given.keys() & decided.keys()):
        raise ValueError(f"model_config has {', '.join(both)}, which the tokens decide: leave it out.")
    return LlamaForCausalLM(LlamaConfig(**{**SIZES[args.model_size], "rms_norm_eps": 1e-5, **given, **decided}))


def check_labels(rows, vocabulary: Vocabulary, whose: str) -> None:
    """
    Raises:
        ValueError: a label is none of the classes; or there is none, and no null condition either.
    """
    labels = rows.unique("label")
    if wrong := sorted(x for x in labels if x is not None and not 0 <= x < vocabulary.num_conditions):
        raise ValueError(
            f"Some labels of {whose} are {wrong[0]}, and classes are 0 to {vocabulary.num_conditions - 1}: pass "
            "--condition none, or tokenize those images that have a class."
        )
    if None in labels and not vocabulary.has_null:
        raise ValueError(
            f"Some images of {whose} have no label, which is no condition: pass --condition_dropout above 0."
        )


def check_eval_data(rows, provenance: Provenance, vocabulary: Vocabulary, whose: str) -> None:
    """
    Raises:
        ValueError: tokens of another tokenizer, grid or classes than those to train on.
    """
    if provenance.tokenizer_hash != vocabulary.tokenizer_hash:
        raise ValueError(
            f"eval_data: the tokens of {whose} are of the tokenizer with hash {provenance.tokenizer_hash}, those of "
            f"--train_data of {vocabulary.tokenizer_hash}."
        )
    if (grid := grid_of(rows, whose)) != (vocabulary.height, vocabulary.width):
        raise ValueError(
            f"eval_data: the images of {whose} have {grid[0]} x {grid[1]} tokens, those of --train_data "
            f"{vocabulary.height} x {vocabulary.width}."
        )
    column = {"class": "label", "text": "text", "none": "key"}[vocabulary.condition]
    if column not in rows.column_names:
        raise ValueError(f"eval_data: the tokens of {whose} have no column {column}.")
    if vocabulary.condition == "class":
        names = class_names(rows, provenance)
        if names != vocabulary.class_names[: len(names)]:
            raise ValueError(f"eval_data: the classes of {whose} are {names}, expected {vocabulary.class_names}.")
        check_labels(rows, vocabulary, whose)


def other_words(output: Path, vocabulary: Vocabulary) -> list[str]:
    """What differs in the vocabulary of the run that a folder holds, but for where its tokenizer is."""
    there = vars(Vocabulary.load(output)) if (output / FILE).is_file() else vars(vocabulary)
    now = {name: value for name, value in vars(vocabulary).items() if name not in ("model_name_or_path", "revision")}
    return [
        f"{name}: {str(there[name])[:60]} there, {str(value)[:60]} now"
        for name, value in now.items()
        if there[name] != value
    ]


def picture_conditions(held_out: ImageSequences, count: int) -> list:
    """Classes, evenly spaced, or the texts of held-out images."""
    vocabulary = held_out.vocabulary
    if vocabulary.condition == "class":
        classes = vocabulary.num_conditions
        return [i * classes // count if classes > count else i % classes for i in range(count)]
    if vocabulary.condition == "text":
        texts = [held_out.rows[held_out.row_number(i % len(held_out))]["text"][0].as_py() for i in range(count)]
        return [held_out.encode_text(text) for text in texts]
    return [None] * count


def rules(model: GeneratorArguments, data: TokenArguments, vocabulary: Vocabulary) -> list[Without]:
    """Options that would have no effect."""
    condition = vocabulary.condition
    return [
        Without("holdout", bool(data.eval_data), "--eval_data names the held-out tokens", "eval_data"),
        Without("condition_dropout", condition == "none", "there is no condition to drop (--condition)", "condition"),
        Without(
            "picture_guidance",
            condition == "none" or not vocabulary.has_null,
            "guidance needs a condition (--condition) that is dropped at times (--condition_dropout)",
            "condition condition_dropout",
        ),
        Without("text_tokenizer max_text_tokens", condition != "text", f"the condition is {condition}", "condition"),
        Without("push_to_hub", True, "push the finished folder by `hf upload`; all that it needs is in there"),
        Without("label_names label_smoothing_factor", True, "the labels are the tokens themselves"),
    ]


@ends_in_one_line(smaller=f"{BATCH_SIZES}, or --model_size")
def main() -> None:
    kinds = GeneratorArguments, TokenArguments, GeneratorTrainingArguments
    with ends_in_one_line(ValueError):  # transformers looks at options too
        (model_args, data_args, training_args), given, by_flags = parse(kinds, sys.argv[1:], __doc__)
    refuse_without_effect(given, by_flags, rules_of_trainer(training_args))
    set_seed(training_args.seed)
    output, main_process = Path(training_args.output_dir), training_args.process_index == 0

    if main_process:
        print(f"Reading the tokens of {data_args.train_data}.", flush=True)
    with training_args.main_process_first(desc="reading tokens"):
        rows, provenance = load_rows(data_args.train_data)
        eval_rows, eval_provenance = load_rows(data_args.eval_data) if data_args.eval_data else (rows, provenance)
    text_tokenizer = None
    if model_args.text_tokenizer:
        with ends_in_one_line(ValueError, ImportError, HFValidationError):
            text_tokenizer = AutoTokenizer.from_pretrained(model_args.text_tokenizer)
    vocabulary = make_vocabulary(model_args, rows, provenance, data_args.train_data, text_tokenizer)
    refuse_without_effect(given, by_flags, rules(model_args, data_args, vocabulary))
    if vocabulary.condition == "text" and not vocabulary.has_null and not all(rows["text"]):
        raise ValueError(
            f"Some texts of {data_args.train_data} are empty, which is no condition: pass --condition_dropout above 0."
        )
    if vocabulary.condition == "class":
        check_labels(rows, vocabulary, data_args.train_data)
    if data_args.eval_data:
        check_eval_data(eval_rows, eval_provenance, vocabulary, data_args.eval_data)
        train_keys, eval_keys = sorted(rows.unique("key")), sorted(eval_rows.unique("key"))
    else:
        train_keys, eval_keys = split_keys(rows, data_args.holdout)

    def encode_text(text: str | None) -> list[int] | None:
        return text_tokenizer(text or "", add_special_tokens=False).input_ids or None

    train = ImageSequences(
        rows, train_keys, vocabulary, encode_text, model_args.condition_dropout, seed=training_args.seed
    )
    held_out = ImageSequences(eval_rows, eval_keys, vocabulary, encode_text)
    if main_process:
        print("Making the generator, and counting codes.", flush=True)
    with ends_in_one_line(ValueError):
        model = make_model(model_args, vocabulary)
    if not (training_args.resume_from_checkpoint and Path(training_args.resume_from_checkpoint).is_dir()):
        on_main_process(lambda: refuse_another_run(output, model.config, others=other_words(output, vocabulary)))
        if said := on_main_process(lambda: finished(output, training_args)):
            if main_process:
                print(said)
            return PartialState().destroy_process_group()
    frequencies = on_main_process(lambda: frequency_models(train, held_out))
    if main_process:
        told = (
            "texts" if vocabulary.condition == "text" else f"{counted(vocabulary.num_conditions, 'class', 'classes')}"
        )
        print(
            f"{counted(len(train), 'image')} to train on, {len(held_out):,} held out, {vocabulary.height} x "
            f"{vocabulary.width} tokens of {vocabulary.codebook_size:,} codes, {told}; "
            f"{model.num_parameters():,} weights.\n"
            f"Nats a token on held-out rows: unigram model {frequencies['unigram']:.3f}, bigram model "
            f"{frequencies['bigram']:.3f} (of {counted(frequencies['counted_rows'], 'row')}).",
            flush=True,
        )
    tokenizer, conditions = None, picture_conditions(held_out, training_args.num_pictures)
    if main_process and conditions:
        try:
            tokenizer = load_painter(vocabulary, model_args.tokenizer, training_args.device)
        except ValueError as error:
            if model_args.tokenizer:
                raise
            print(f"No pictures of new images: {error}", flush=True)
    checkpoint = on_main_process(lambda: find_checkpoint(training_args.resume_from_checkpoint, str(output)))
    if main_process:
        recipe = {"options": public_options(given), "tokens": asdict(provenance.public())}
        recipe["versions"] = library_versions()
        for name, text in (
            ("training_recipe.json", json.dumps(recipe, indent=2)),
            ("frequency_models.json", json.dumps(frequencies, indent=2)),
            ("heldout_keys.txt", "\n".join(eval_keys)),
        ):
            write_whole(output / name, lambda path, text=text: path.write_text(text + "\n"))
        vocabulary.save(output)
    trainer = GeneratorTrainer(
        model,
        training_args,
        train,
        vocabulary,
        frequencies={name: frequencies[name] for name in ("unigram", "bigram")},
        tokenizer=tokenizer,
        picture_conditions=conditions,
        eval_dataset=held_out,
        processing_class=text_tokenizer if vocabulary.condition == "text" else None,
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(_internal_call=True)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if main_process:
        print(f"Generator ({'averaged' if trainer.ema else 'trained'} weights) and {FILE}: {output}")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
