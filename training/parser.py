"""What `--help` of a training shows: its own options by what they are about, and few of the many of transformers."""

import argparse
from copy import copy
from dataclasses import fields

from transformers import HfArgumentParser, TrainingArguments

from eval.commands import CommandParser


# the options of transformers that most trainings need, in words that say what they do here
USUAL = {
    "output_dir": "Where the model, its checkpoints, logs and pictures go.",
    "max_steps": "Steps to train; -1: as many as --num_train_epochs take.",
    "num_train_epochs": "Times that every image is seen.",
    "per_device_train_batch_size": "Images at a time, on each device. Lower it where memory does not suffice.",
    "gradient_accumulation_steps": "Batches to a step: 4 of 8 images train as one of 32, in the memory of 8.",
    "per_device_eval_batch_size": "Images at a time in an evaluation, on each device.",
    "learning_rate": "The highest one, at the end of the warm-up.",
    "lr_scheduler_type": "How the learning rate falls after the warm-up: linear, cosine, constant_with_warmup, ...",
    "warmup_steps": "Steps in which the learning rate rises from 0; below 1: a share of all steps.",
    "weight_decay": "Weight decay of AdamW.",
    "bf16": "Mixed precision in bfloat16: about twice as fast on a GPU, in less memory.",
    "eval_strategy": "When to measure held-out images: no (at the end alone), steps or epoch.",
    "eval_steps": "Steps between two evaluations, with --eval_strategy steps. Default: --logging_steps.",
    "save_strategy": "When to save a checkpoint: no, steps or epoch.",
    "save_steps": "Steps between two checkpoints.",
    "save_total_limit": "Keep so many checkpoints, the latest. Default: all.",
    "resume_from_checkpoint": "A folder of a checkpoint to go on from. Default: the latest one in --output_dir.",
    "seed": "Seed of everything random.",
    "dataloader_num_workers": "Processes that read images; 0: the one that trains.",
    "report_to": "Where else the log goes: tensorboard, trackio, ... or none.",
    "use_cpu": "Train on the CPU, also where there is a GPU.",
}
TRAINER = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"


class TrainingParser(CommandParser, HfArgumentParser):
    """Parser of dataclasses, the last of which inherits from `TrainingArguments`.

    Args:
        kinds: the dataclasses. Their docstrings stand above their options.
        description: for `--help`.
    """

    def __init__(self, kinds: tuple[type, ...], description: str) -> None:
        usage = "%(prog)s [FILE.json | FILE.yaml] [options]"
        super().__init__(description, dataclass_types=kinds, usage=usage, allow_abbrev=False)
        for action in self._actions:  # spellings with dashes are understood, and not shown
            action.option_strings = [option for option in action.option_strings if "-" not in option.lstrip("-")]

    def format_help(self) -> str:
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        for title, text, actions in self._sections():
            formatter.start_section(title)
            formatter.add_text(text)
            formatter.add_arguments([_with_default(action) for action in actions])
            formatter.end_section()
        return formatter.format_help()

    def _sections(self) -> list[tuple[str, str | None, list[argparse.Action]]]:
        """Title, text and options of each."""
        *kinds, training = self.dataclass_types
        sections = [
            (kind.__name__.removesuffix("Arguments").lower(), kind.__doc__, [field.name for field in fields(kind)])
            for kind in kinds
        ]
        # a field that is not declared anew is the one of transformers itself
        theirs = {field.name: field for field in fields(TrainingArguments)}
        own = [field.name for field in fields(training) if field is not theirs.get(field.name)]
        sections.append(("training", None, [name for name in own if not is_adversarial(name)]))
        if adversarial := [name for name in own if is_adversarial(name)]:
            sections.append(("adversarial training", "They need --gan_weight above 0.", adversarial))
        found = [(title, text, [self._option(name) for name in names]) for title, text, names in sections]
        usual = [self._option(name, help=help, choices=None) for name, help in USUAL.items() if name not in own]
        text = f"The usual ones. All of TrainingArguments work, which are explained at\n{TRAINER}"
        return [*found, ("options of transformers", text, usual)]

    def _option(self, name: str, **changed) -> argparse.Action:
        """A copy of an option, with what is changed of it."""
        option = copy(self._option_string_actions[f"--{name}"])
        vars(option).update(changed)
        return option


def _with_default(option: argparse.Action) -> argparse.Action:
    """An option whose help says the default, or that there is none."""
    if option.required:
        option.help += " (required)"
    elif option.default is not None and option.default is not False and "default" not in option.help.lower():
        option.help += f" (default: {getattr(option.default, 'value', option.default)})"
    return option


def is_adversarial(name: str) -> bool:
    """Whether a training option is about the GAN."""
    return name.startswith(("gan_", "discriminator", "lecam_"))
