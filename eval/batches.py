"""Batches of images, loaded beside the work on them."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from eval.crops import CroppedImages, collate_images


class _Batches(torch.utils.data.Dataset):
    """Gives an error instead of raising it: what a worker raises arrives with its traceback as the message."""

    def __init__(self, images: CroppedImages, batches: list[list[int]]) -> None:
        self.images, self.batches = images, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict | Exception:
        try:
            return collate_images([self.images[index] for index in self.batches[number]])
        except (ValueError, RuntimeError) as error:
            return error


def load_batches(images: CroppedImages, batches: list[list[int]], num_workers: int) -> Iterator[dict]:
    """Batches as `collate_images` makes them, in their order.

    Args:
        images: where they are taken from.
        batches: the numbers of the images of each.
        num_workers: processes that load them; 0: this one.

    Raises:
        ValueError, RuntimeError: see `collate_images` and `CroppedImages`.
    """
    for batch in DataLoader(_Batches(images, batches), batch_size=None, num_workers=num_workers):
        if isinstance(batch, Exception):
            raise batch
        yield batch
