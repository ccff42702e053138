"""Reading and writing files."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml


def read_fields(path: Path) -> dict:
    """The fields of a JSON or YAML file.

    Raises:
        ValueError: it is no such file.
    """
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = path.read_text()
        fields = json.loads(text) if kind == "JSON" else yaml.safe_load(text)  # YAML takes the number 1e-5 for a text
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no {kind}: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no fields with names.")
    return fields


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all: beside it first, then renamed. Nothing is left behind if that fails.

    Args:
        path: the file; its folder is made.
        write: given the path to write to (which ends in `.tmp`, whatever the format).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}.tmp")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_folder_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a folder whole or not at all, and leaves nothing behind if that fails.

    Args:
        path: the folder, which is empty or does not exist.
        write: given the folder to write to, which it makes.
    """
    unfinished = path.with_name(f"unfinished-{path.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sha256_of_files(*paths: Path) -> str:
    """SHA-256 of the bytes of files, one after the other, a block at a time."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
