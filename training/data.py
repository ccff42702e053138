"""Training data: splits that keep sources apart, random crops, batches."""

import itertools
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import torch
from torchvision.transforms import v2
from tqdm import tqdm

from image_processing_simvq import VQRAEImageProcessor
from reading.images import decode_image


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
        groups.setdefault(file.stem.split(group_separator)[0] if group_separator else str(file), []).append(file)
    if len(groups) < 2:
        raise ValueError(f"{len(files)} images in {len(groups)} group(s) cannot be split; pass --eval_data.")
    step = max(2, round(1 / holdout))
    names = list(groups)
    held_out = set(names[:: min(step, len(names))])
    return (
        [file for name in names if name not in held_out for file in groups[name]],
        [file for name in names if name in held_out for file in groups[name]],
    )


def readable_images(files: list[Path], skipped_list: Path) -> list[Path]:
    """The files that can be decoded; the others are listed with the reason in `skipped_list`. Evaluation must not meet
    an unreadable image, nor silently another one in its place."""

    def reason(file: Path) -> str | None:
        try:
            decode_image({"path": str(file), "bytes": None})
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        reasons = list(tqdm(pool.map(reason, files), total=len(files), desc="Checking held-out images", unit="image"))
    unreadable = [(file, text) for file, text in zip(files, reasons) if text]
    if unreadable:
        skipped_list.parent.mkdir(parents=True, exist_ok=True)
        with open(skipped_list, "a") as listing:
            listing.writelines(f"{file}\t{' '.join(text.split())}\n" for file, text in unreadable)
    return [file for file, text in zip(files, reasons) if not text]


class TrainTransform:
    """Encoded images -> random resized crops, flipped at random, (3, size, size) in [0, 1].

    The crop of an image depends on its name, the epoch and the seed, and on nothing else: not on the order, the number
    of workers or what was drawn before, so that a resumed run meets the crops of the uninterrupted one.

    An image that cannot be read is replaced by the next readable one of its batch (by grey, if there is none) and
    listed in a file with the reason: a run of days does not end over one file.

    Args:
        image_size: side of the crop in pixels.
        min_crop_area: smallest share of the image that a crop covers.
        seed: of the crops.
        skipped_list: the file to list unreadable images in. `None`: an unreadable image is an error.
    """

    def __init__(
        self, image_size: int, min_crop_area: float, seed: int = 0, skipped_list: str | Path | None = None
    ) -> None:
        self.image_size = image_size
        self.min_crop_area = min_crop_area
        self.seed = seed
        self.strict = False  # an unreadable image is an error, not listed
        self.tokens = None  # (passes, images, h, w), see `tokenize_crops`
        self.skipped_list = None if skipped_list is None else Path(skipped_list)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that already run
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
        self._reported = set()

    def set_epoch(self, epoch: int) -> None:
        """Other crops from here on; with tokens, those of one of their passes."""
        self.epoch.fill_(epoch if self.tokens is None else epoch % len(self.tokens))

    def count_skipped(self) -> int:
        """Images in the list, whichever process or run wrote them."""
        if self.skipped_list is None or not self.skipped_list.exists():
            return 0
        return len({line.split("\t")[0] for line in self.skipped_list.read_text().splitlines()})

    def _crop(self, record: dict) -> torch.Tensor | None:
        try:
            image = self.processor.convert_to_rgb(decode_image(record))
        except ValueError as error:
            if self.skipped_list is None or self.strict:
                raise
            self._report(record["path"] or "(without a name)", str(error))
            return None
        name = Path(record["path"]).name.encode() if record["path"] else record["bytes"]
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which would seed the GPU's generators as well
            torch.default_generator.manual_seed(
                zlib.crc32(name, zlib.crc32(f"{self.seed} {self.epoch.item()}".encode()))
            )
            return self.augment(image)

    def _report(self, path: str, reason: str) -> None:
        if path not in self._reported:  # by this process
            self._reported.add(path)
            self.skipped_list.parent.mkdir(parents=True, exist_ok=True)
            with open(self.skipped_list, "a") as file:  # short lines are appended whole, also by several processes
                file.write(f"{path}\t{' '.join(reason.split())}\n")

    def __call__(self, batch: dict) -> dict:
        crops = [self._crop(record) for record in batch["image"]]
        readable = [crop for crop in crops if crop is not None]
        substitutes = itertools.cycle(readable or [torch.full((3, self.image_size, self.image_size), 0.5)])
        items = {"pixel_values": [next(substitutes) if crop is None else crop for crop in crops]}
        if self.tokens is not None:
            items["image_tokens"] = list(self.tokens[self.epoch, batch["row"]].long())
        return items


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
    """Items with `pixel_values` (3, H, W), and `image_tokens` (h, w) if they are known -> batches of them."""
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}
