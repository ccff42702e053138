"""Writing files."""

import os
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
