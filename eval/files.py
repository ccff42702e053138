"""Writing files."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all: beside it first, then renamed.

    Args:
        path: the file; its folder is made.
        write: given the path to write to (which ends in `.tmp`, whatever the format).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}.tmp")
    write(unfinished)
    os.replace(unfinished, path)


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
