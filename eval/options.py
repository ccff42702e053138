"""Options of commands that argparse does not check by itself; each is for `type=`."""

import argparse

import torch


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
