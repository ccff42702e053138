"""Options of commands: which images, and values that argparse does not check by itself (for `type=`)."""

import argparse

import torch


def add_source_options(group, split: str, required: bool = False, columns: tuple[str, ...] = ("image",)) -> None:
    """`--data` and what belongs to it, see `open_source`.

    Args:
        group: of the parser.
        split: the default.
        required: whether `--data` is.
        columns: which of "image", "label" and "text" the command reads.
    """
    group.add_argument(
        "--data",
        required=required,
        help="A folder of images, a .txt file that lists them, tars (WebDataset), parquet files, a zip, a folder of "
        "save_to_disk, or a dataset of the hub (docs/data.md).",
    )
    group.add_argument("--split", default=split, help=f"Split, of a source that has several (default: {split}).")
    group.add_argument("--dataset_config_name", help="Configuration of a hub dataset.")
    what = {"image": "images", "label": "labels", "text": "captions"}
    for name in columns:
        text = f"Column with the {what[name]} (default: told from types and usual names)."
        group.add_argument(f"--{name}_column", help=text)


def whole_number(least: int = 1):
    """An integer of at least `least`."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return whole_number


def present_device(text: str) -> torch.device:
    """A device that is there."""
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch has no CUDA at all
        raise argparse.ArgumentTypeError(f"'{text}' is not here: {str(error).splitlines()[0]}") from error
    return found
