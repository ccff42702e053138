"""Whether images are some that a model was trained on, as far as the folder of its run tells."""

import json
from pathlib import Path


def seen_images(model: str | Path, files: list[Path]) -> str | None:
    """What is to be said where files lie in the folder that a model was trained on and were not held out.

    The recipe has but the last part of that folder's path; the images that were held out of it have whole ones.

    Args:
        model: the folder of a run of train_hf.py, or anything else, of which nothing is known.
        files: of the images.

    Returns:
        A line; `None`: there are none, or it cannot be known.
    """
    recipe, listing = Path(model) / "training_recipe.json", Path(model) / "heldout_images.txt"
    try:
        name = Path(json.loads(recipe.read_text())["train_data"]).name
        held_out = {Path(line) for line in listing.read_text().splitlines()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    folders = {parent for file in held_out for parent in file.parents if parent.name == name}
    if not name or len(folders) != 1:
        return None
    (folder,) = folders
    seen = [file for file in map(Path.resolve, files) if file.is_relative_to(folder) and file not in held_out]
    if not seen:
        return None
    return (
        f"{len(seen)} of the {len(files)} images lie in {folder}, on which {model} was trained, and were not held out: "
        f"its numbers on others may be lower. Held out are those of {listing}."
    )
