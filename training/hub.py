"""Checkpoints on the hub. What Trainer pickles goes up as safetensors and is turned back when it comes down: no pickle
is ever uploaded, nor unpickled from there."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from eval.files import write_whole


PICKLES = ("*.pt", "*.pth", "*.bin", "*.pkl", "*.ckpt")
STATE = ".state.safetensors"  # behind the name of the file that it stands for


def is_pickle(file: Path) -> bool:
    """Whether a file is one that PyTorch or pickle writes, by its suffix."""
    return any(file.match(pattern) for pattern in PICKLES)


def export_checkpoint(checkpoint: Path, target: Path) -> None:
    """Writes a checkpoint folder anew without pickles: `optimizer.pt` becomes `optimizer.pt.state.safetensors`.

    Args:
        checkpoint: of a [`VQRAETrainer`].
        target: a folder, which is made.
    """
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        copy = target / file.relative_to(checkpoint)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.name == TRAINER_STATE_NAME:  # without the path of a folder here
            state = json.loads(file.read_text()) | {"best_model_checkpoint": None}
            copy.write_text(json.dumps(state, indent=2))
            continue
        if not is_pickle(file):
            shutil.copy(file, copy)
            continue
        with safe_globals():
            state = torch.load(file, map_location="cpu", weights_only=True)
        tensors = {}
        structure = json.dumps(_taken_apart(state, tensors))
        save_file(tensors, f"{copy}{STATE}", {"structure": structure})


def import_checkpoint(folder: Path) -> None:
    """Turns what `export_checkpoint` wrote back into the files that Trainer reads."""
    for file in folder.rglob(f"*{STATE}"):
        with safe_open(file, framework="pt") as tensors:
            state = _put_together(json.loads(tensors.metadata()["structure"]), tensors)
        write_whole(file.with_name(file.name.removesuffix(STATE)), lambda path, state=state: torch.save(state, path))
        file.unlink()


def on_main_process(function: Callable):
    """What a function returns on the main process, on every process. Its error ends all of them: the others would wait
    for an answer.

    Raises:
        RuntimeError: on the other processes, for whatever it raises on the main one.
    """
    state, answer, error = PartialState(), None, None
    if state.is_main_process:
        try:
            answer = function()
        except Exception as caught:
            error = caught
    if state.num_processes > 1:
        answer, text = broadcast_object_list([answer, f"{type(error).__name__}: {error}" if error else None])
        if text and not state.is_main_process:
            raise RuntimeError(f"The main process ended: {text}")
    if error:
        raise error
    return answer


def find_checkpoint(resume_from: str | None, output_dir: str, token: str | None = None) -> str | None:
    """The checkpoint that a run goes on with. One process must look for all: a download appears among the run's own.

    Args:
        resume_from: `--resume_from_checkpoint`, a folder or a repository of the hub. A run that began with one of the
            hub goes on with its own.
        output_dir: of the run.
        token: of the hub.

    Returns:
        A folder; `None`: the run starts anew.

    Raises:
        ValueError: see `download_checkpoint`.
    """
    if resume_from and os.path.isdir(resume_from):
        return resume_from
    last = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if last:
        print(f"Resuming from {last}; remove it, or choose another --output_dir, to start anew.")
        return last
    return download_checkpoint(resume_from, output_dir, token) if resume_from else None


def download_checkpoint(name: str, output_dir: str, token: str | None = None) -> str:
    """Fetches the last checkpoint of a run that was pushed with `--hub_strategy checkpoint`.

    Args:
        name: a repository of the hub, `org/name`, or a branch, tag or commit of it, `org/name@revision`.
        output_dir: of the run; the checkpoint becomes its `checkpoint-N`.
        token: of the hub.

    Returns:
        The folder of the checkpoint.

    Raises:
        ValueError: there is no such repository, it cannot be read, or it has no checkpoint.
    """
    repository, _, revision = name.partition("@")
    print(f"Fetching the last checkpoint of {name}.", flush=True)
    files = [f"last-checkpoint/{pattern}" for pattern in ("*.json", "*.py", "*.safetensors")]  # no pickles
    try:
        snapshot = snapshot_download(repository, revision=revision or None, token=token, allow_patterns=files)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"--resume_from_checkpoint {name} is neither a folder nor a repository of the hub that can be read: {error}"
        ) from error
    source = Path(snapshot) / "last-checkpoint"
    if not (source / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"{name} has no last-checkpoint: only runs pushed with --hub_strategy checkpoint can be resumed from "
            "the hub. --model_name_or_path starts a new run from its weights."
        )
    state = checked_state(source / TRAINER_STATE_NAME, name)
    target = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state['global_step']}"
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=output_dir) as unfinished:  # nobody else's
        copy = Path(unfinished) / target.name
        shutil.copytree(source, copy)
        import_checkpoint(copy)
        state["best_model_checkpoint"] = None  # would be a path of another machine
        (copy / TRAINER_STATE_NAME).write_text(json.dumps(state, indent=2))
        if not target.exists():  # else another run has fetched it in the meantime
            os.replace(copy, target)
    return str(target)


def checked_state(file: Path, of: str) -> dict:
    """What a trainer_state.json holds. Paths are made of its steps, so they must be numbers.

    Args:
        file: which a stranger may have written.
        of: a name for what it is of, for the error.

    Raises:
        ValueError: it is no such file, or a step is no whole number from 0 on.
    """
    try:
        state = json.loads(file.read_text())
        steps = [state["global_step"], state.get("best_global_step") or 0]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{of}: its {file.name} is none that Trainer wrote ({error!r}).") from error
    if not all(type(step) is int and 0 <= step < 10**12 for step in steps):
        raise ValueError(f"{of}: global_step and best_global_step of its {file.name} are {steps}, expected numbers.")
    return state


def _taken_apart(value, tensors: dict[str, torch.Tensor]):
    """JSON that tells how `value` is built; its tensors and arrays go into `tensors`."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        name = str(len(tensors))
        tensors[name] = torch.as_tensor(value).clone().contiguous()
        return {"tensor" if isinstance(value, torch.Tensor) else "array": name}
    if isinstance(value, dict):
        return {"dict": [[_taken_apart(k, tensors), _taken_apart(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_taken_apart(x, tensors) for x in value]}
    if isinstance(value, list):
        return [_taken_apart(x, tensors) for x in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"A state with a {type(value).__name__} cannot be written as safetensors.")


def _put_together(value, tensors):
    if isinstance(value, list):
        return [_put_together(x, tensors) for x in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {_put_together(k, tensors): _put_together(v, tensors) for k, v in content}
    if kind == "tuple":
        return tuple(_put_together(x, tensors) for x in content)
    tensor = tensors.get_tensor(content)
    return tensor.numpy() if kind == "array" else tensor
