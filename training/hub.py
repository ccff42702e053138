"""Checkpoints on the hub. What Trainer pickles goes up as safetensors and is turned back when it comes down: no pickle
is ever uploaded, nor unpickled from there."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

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
    step = json.loads((source / TRAINER_STATE_NAME).read_text())["global_step"]
    target = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    unfinished = Path(output_dir) / "unfinished" / target.name
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished)
    import_checkpoint(unfinished)
    os.replace(unfinished, target)
    return str(target)


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
