"""Training data: splits that keep sources apart, random crops, batches."""

from pathlib import Path

import datasets
import torch
from torchvision.transforms import v2

from eval.images import decode_image
from image_processing_simvq import VQRAEImageProcessor


def split_files(files: list[Path], holdout: float, group_separator: str | None) -> tuple[list[Path], list[Path]]:
    """Splits files into training and held-out ones, the same way every time.

    Args:
        files: sorted.
        holdout: share of the groups to hold out, in (0, 1).
        group_separator: files whose names agree up to it stay together (crops of one photograph). `None`: every file
            is a group of its own.

    Raises:
        ValueError: fewer than two groups.
    """
    groups = {}
    for file in files:
        groups.setdefault(file.name.split(group_separator)[0] if group_separator else str(file), []).append(file)
    if len(groups) < 2:
        raise ValueError(f"{len(files)} images in {len(groups)} group(s) cannot be split; pass --eval_data.")
    step = max(2, round(1 / holdout))
    names = list(groups)
    held_out = set(names[:: min(step, len(names))])
    return (
        [file for name in names if name not in held_out for file in groups[name]],
        [file for name in names if name in held_out for file in groups[name]],
    )


class TrainTransform:
    """Encoded images -> random resized crops, flipped at random, (3, size, size) in [0, 1].

    Args:
        image_size: side of the crop in pixels.
        min_crop_area: smallest share of the image that a crop covers.
    """

    def __init__(self, image_size: int, min_crop_area: float) -> None:
        self.processor = VQRAEImageProcessor.for_image_size(image_size)
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(
                    image_size, scale=(min_crop_area, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
                ),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __call__(self, batch: dict) -> dict:
        images = [self.processor.convert_to_rgb(decode_image(record)) for record in batch["image"]]
        return {"pixel_values": [self.augment(image) for image in images]}


class EvalTransform:
    """Encoded images -> what the image processor makes of them."""

    def __init__(self, processor: VQRAEImageProcessor) -> None:
        self.processor = processor

    def __call__(self, batch: dict) -> dict:
        images = [decode_image(record) for record in batch["image"]]
        return {"pixel_values": list(self.processor(images, return_tensors="pt").pixel_values)}


def with_pixels(dataset, transform):
    """The dataset with `pixel_values`, made when an item is read."""
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(transform, batched=True, batch_size=32, remove_columns=["image"])
    return dataset.with_transform(transform)


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    """Items with `pixel_values` (3, H, W) -> (B, 3, H, W)."""
    return {"pixel_values": torch.stack([torch.as_tensor(item["pixel_values"]) for item in items])}
