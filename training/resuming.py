"""What --output_dir holds when a run begins: a run to go on with, a finished one, or one of another kind."""

import json
import shlex
from dataclasses import fields
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from eval.files import read_fields
from reading.sources import public_name
from training.card import RECIPE
from training.hub import checked_state


STARTS = ("encoder_name_or_path", "model_name_or_path")  # options that say where the weights come from
# fields of configurations that do not tell runs apart: of any model, found in training, or free to change on the way
LEFT_OUT = {field.name for field in fields(PreTrainedConfig)} | {"auto_map", "torch_dtype", "use_cache"}
LEFT_OUT |= {"codebook_init", "codebook_init_latents", "latents_fit"}
LEFT_OUT |= {"commitment_cost", "noise_tau", "attention_dropout", "initializer_range"}
SHOWN = 3  # differences in an error


def refuse_another_run(
    output_dir: str | Path, config: PreTrainedConfig, given: dict | None = None, others: list[str] = ()
) -> None:
    """
    Args:
        output_dir: of the run that begins.
        config: of its model.
        given: its options by name, where they say where its weights come from (`STARTS`).
        others: what else is known to differ.

    Raises:
        ValueError: the folder holds a run of another model, or one that began elsewhere; what differs is named.
    """
    folder = held_run(output_dir)
    if folder is None:
        return
    different = list(others)
    if given is not None and (recipe := Path(output_dir) / RECIPE).is_file():
        before = read_fields(recipe)
        for name in STARTS:
            # a path is recorded by its last part, which "." does not have itself
            was, now = (Path(public_name(x)).name if x else None for x in (before.get(name), given.get(name)))
            if was != now:
                different.append(f"{name}: {before.get(name)} there, {given.get(name)} now")
    if (file := folder / CONFIG_NAME).is_file():
        there = read_fields(file)
        if there.get("model_type") == config.model_type:
            there = type(config).from_pretrained(folder).to_dict()
            different += _differences(there, config.to_dict())
        else:
            different.append(f"model_type: {there.get('model_type')} there, {config.model_type} now")
    if different:
        more = f"; and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        instead = "choose another --output_dir"
        if given is not None:
            start = output_dir if (Path(output_dir) / SAFE_WEIGHTS_NAME).is_file() else folder
            instead += f", with --model_name_or_path {start} to begin with what was learned there"
        raise ValueError(f"{output_dir} holds another run ({'; '.join(different[:SHOWN])}{more}): {instead}.")


def held_run(output_dir: str | Path) -> Path | None:
    """The last checkpoint in the folder of a run; the folder itself where a finished run left none."""
    output_dir = Path(output_dir)
    if output_dir.is_dir() and (last := get_last_checkpoint(str(output_dir))):
        return Path(last)
    return output_dir if (output_dir / TRAINER_STATE_NAME).is_file() else None


def finished(output_dir: str | Path, args) -> str | None:
    """What is to be said of a run that has nothing left to do; `None`: it has. The state of Trainer in the folder
    itself is written when all else is, see `CheckpointingTrainer.save_state`.

    Args:
        output_dir: of the run.
        args: `TrainingArguments`, which say how long it is to be.
    """
    file = Path(output_dir) / TRAINER_STATE_NAME
    if not file.is_file():
        return None
    state = checked_state(file, str(output_dir))
    by_steps = args.max_steps > 0
    if not (state["global_step"] >= args.max_steps if by_steps else (state.get("epoch") or 0) >= args.num_train_epochs):
        return None
    option = "--max_steps" if by_steps else "--num_train_epochs"
    longer = f"a larger {option} trains on"
    if held_run(output_dir) == Path(output_dir):
        longer = "it has no checkpoint to train on from"
    said = (
        f"{output_dir} is finished (step {state['global_step']} of {state.get('max_steps')}) and stays as it is: "
        f"{longer}, another --output_dir trains anew."
    )
    if args.push_to_hub:
        upload = ["hf", "upload", args.hub_model_id or Path(output_dir).name, output_dir]
        upload += ["--exclude", "checkpoint-*", "--exclude", "*.txt"]  # of this machine alone
        said += f" Nothing is pushed now: `{shlex.join(map(str, upload))}` does it."
    return said


def _differences(there: dict, now: dict, prefix: str = "") -> list[str]:
    lines = []
    there, now = (json.loads(json.dumps(fields, default=str)) for fields in (there, now))  # tuples become lists
    for name in now:
        a, b = there.get(name), now[name]
        if name in LEFT_OUT or name.startswith("_") or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _differences(a, b, f"{prefix}{name}.")
        else:
            option = " (--stage)" if name == "freeze_encoder" else ""
            lines.append(f"{prefix}{name}{option}: {a} there, {b} now")
    return lines
