"""Training data: splits that keep sources apart, random crops, batches."""

import itertools
import random
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import torch
from torchvision.transforms import v2
from tqdm import tqdm

from image_processing_simvq import VQRAEImageProcessor
from reading.images import decode_image, image_name, shown_path
from reading.wording import counted


def split_files(files: list[Path], holdout: float, group_separator: str | None) -> tuple[list[Path], list[Path]]:
    """Splits files into training and held-out ones, the same way every time: evenly spread among the sorted ones.

    Args:
        files: sorted.
        holdout: share of the groups to hold out, in (0, 1); rounded, at least one group, and never all.
        group_separator: files whose names agree up to it stay together (crops of one photograph). `None`: every file
            is a group of its own.

    Raises:
        ValueError: fewer than two groups.
    """
    groups = {}
    for file in files:
        groups.setdefault(file.stem.split(group_separator)[0] if group_separator else str(file), []).append(file)
    if len(groups) < 2:
        raise ValueError(
            f"{counted(len(files), 'image')} in {counted(len(groups), 'group')} cannot be split; pass --eval_data."
        )
    groups = list(groups.values())
    train, held_out = (
        [file for number in part for file in groups[number]] for part in split_rows(len(groups), holdout)
    )
    return train, held_out


def split_rows(length: int, holdout: float) -> tuple[list[int], list[int]]:
    """The numbers below `length` to train on, and those to hold out, a share of `holdout`: see `split_files`."""
    if length < 2:
        raise ValueError(f"{counted(length, 'image')} cannot be split; pass --eval_data.")
    count = min(max(1, round(holdout * length)), length - 1)
    held_out = range(0, length, round(1 / holdout))  # where that is as many, the split of earlier versions: they go on
    if len(held_out) != count:
        held_out = [i * length // count for i in range(count)]
    held_out = set(held_out)
    return [i for i in range(length) if i not in held_out], sorted(held_out)


def sample_indices(length: int, count: int, seed: int) -> list[int]:
    """`count` of the indices below `length` (all, if there are no more), drawn by the seed, in ascending order."""
    return sorted(random.Random(seed).sample(range(length), min(count, length)))


class SkippedImages:
    """The images of a run that could not be read, in a file: a name and the reason in each line.

    The file is what all processes, their workers, and the runs that resume it have in common: each looks at what others
    have appended before it does so itself, and reads no line twice. It ends at `MAX_NAMES` names, and with it the
    memory that they take.

    Args:
        path: of the file; need not exist.
    """

    MAX_NAMES = 10_000

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._names = {}  # in order
        self._position = 0

    def __len__(self) -> int:
        """Different names, whichever process or run wrote them; at most `MAX_NAMES`."""
        self._read()
        return len(self._names)

    def add(self, name: str, reason: str) -> None:
        name = " ".join(name.split())
        self._read()
        if name not in self._names and len(self._names) < self.MAX_NAMES:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as file:
                # short lines are appended whole, also by several processes
                file.write(f"{name}\t{' '.join(reason.split())}\n")

    def latest(self) -> list[str]:
        """Names, the last one that was written first."""
        self._read()
        return list(reversed(self._names))

    def _read(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n") or len(self._names) >= self.MAX_NAMES:
                    break
                self._position += len(line)
                self._names[line[:-1].split(b"\t")[0].decode("utf-8", "surrogateescape")] = None


def readable_images(files: list[Path], skipped_list: str | Path) -> list[Path]:
    """The files that can be decoded; the others are listed with the reason in `skipped_list`. Evaluation must not meet
    an unreadable image, nor silently another one in its place."""
    reasons = _unreadable([{"path": str(file), "bytes": None} for file in files], "held-out")
    listing = SkippedImages(skipped_list)
    for number, reason in reasons.items():
        listing.add(str(files[number]), reason)
    return [file for number, file in enumerate(files) if number not in reasons]


def _unreadable(records, what: str) -> dict[int, str]:
    """Which of the records cannot be decoded, by number, with the reason."""

    def reason(number: int) -> str | None:
        try:
            decode_image(records[number])
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        found = pool.map(reason, range(len(records)))
        reasons = list(tqdm(found, total=len(records), desc=f"Checking {what} images", unit="image"))
    return {number: text for number, text in enumerate(reasons) if text}


class TooManyUnreadable(ValueError):
    """More training images cannot be read than the run puts up with."""

    def __init__(self, message: str) -> None:
        # a DataLoader makes another one, of the whole traceback in its worker
        super().__init__(message.rpartition("TooManyUnreadable: ")[2].strip())


class TrainTransform:
    """Encoded images -> random resized crops, flipped at random, (3, size, size) in [0, 1].

    The crop of an image depends on its name (`image_name`), the epoch and the seed, and on nothing else: not on the
    order, the number of workers or what was drawn before, so that a resumed run meets the crops of the uninterrupted
    one.

    An image that cannot be read is replaced by the next readable one of its batch, or by one of a few others of the
    dataset (in a stream, a batch without a readable one is left out), and listed in a file with the reason: a run of
    days does not end over one file. It does end where nothing can be read, and where more than `HANDFUL` different
    images could not be read and these are more than `HANDFUL` + `max_unreadable_share` of all images seen. Each process
    of a run counts what it has seen itself, with its workers, and from 0 when it resumes.

    Args:
        image_size: side of the crop in pixels.
        min_crop_area: smallest share of the image that a crop covers.
        seed: of the crops.
        skipped_list: the file to list unreadable images in. `None`: an unreadable image is an error.
        max_unreadable_share: see above.
    """

    HANDFUL = 10

    def __init__(
        self,
        image_size: int,
        min_crop_area: float,
        seed: int = 0,
        skipped_list: str | Path | None = None,
        max_unreadable_share: float = 0.01,
    ) -> None:
        self.image_size = image_size
        self.min_crop_area = min_crop_area
        self.seed = seed
        self.strict = False  # an unreadable image is an error, not listed
        self.tokens = None  # (passes, images, h, w), see `tokenize_crops`
        self.skipped_list = None if skipped_list is None else Path(skipped_list)
        self._skipped = None  # what is in that file
        self._latest = deque(maxlen=3)  # of the names in it, which this process has met
        self.max_unreadable_share = max_unreadable_share
        self.substitutes = []  # records, see `with_pixels`
        # in memory that workers share: the epoch is told to those that already run, counts outlive them
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._counts = torch.zeros(256, 2, dtype=torch.int64).share_memory_()  # a row for each: seen, unreadable
        self.processor = VQRAEImageProcessor.for_image_size(image_size)
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(
                    image_size,
                    scale=(min_crop_area, 1.0),
                    interpolation=self.processor.resample,
                    antialias=True,
                ),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def set_epoch(self, epoch: int) -> None:
        """Other crops from here on; with tokens, those of one of their passes."""
        self.epoch.fill_(epoch if self.tokens is None else epoch % len(self.tokens))

    def count_skipped(self) -> int:
        """Images in the list, whichever process or run wrote them."""
        return 0 if self.skipped_list is None else len(self._listing())

    def _listing(self) -> SkippedImages:
        if self._skipped is None or self._skipped.path != self.skipped_list:
            self._skipped = SkippedImages(self.skipped_list)
        return self._skipped

    def _crop(self, record: dict | None) -> torch.Tensor | None:
        try:
            image = decode_image(record)
        except ValueError as error:
            if self.skipped_list is None or self.strict:
                raise
            name = shown_path(record) or f"(no image, after {self._counts[:, 0].sum()} others)"
            self._listing().add(name, str(error))
            self._latest.appendleft(name)
            return None
        name = image_name(record).encode(errors="surrogateescape")
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which would seed the GPU's generators as well
            torch.default_generator.manual_seed(
                zlib.crc32(name, zlib.crc32(f"{self.seed} {self.epoch.item()}".encode()))
            )
            return self.augment(image)

    def _check(self, seen: int, unreadable: int) -> None:
        """Counts, and ends the run if too many images cannot be read."""
        worker = torch.utils.data.get_worker_info()
        self._counts[0 if worker is None else 1 + worker.id % 255] += torch.tensor([seen, unreadable])
        if not unreadable:
            return
        seen, unreadable = self._counts.sum(0).tolist()
        if unreadable > self.HANDFUL + self.max_unreadable_share * seen and self.count_skipped() > self.HANDFUL:
            raise TooManyUnreadable(
                f"{unreadable} of the {seen} training images so far cannot be read, {self._examples()}: remove or "
                f"replace them, or allow more than --max_unreadable_share {self.max_unreadable_share:g}."
            )

    def _examples(self) -> str:
        names = list(dict.fromkeys([*self._latest, *self._listing().latest()]))
        return f"such as {', '.join(names[:3])} (all, with reasons: {self.skipped_list})"

    def _substitute(self, tried: int) -> list[torch.Tensor]:
        """A crop in place of those of a batch of which none could be read; none, where a stream may go on without."""
        readable = (crop for crop in map(self._crop, self.substitutes) if crop is not None)
        if (crop := next(readable, None)) is not None:
            return [crop]
        seen, unreadable = self._counts.sum(0).tolist()
        if self.substitutes or unreadable == seen:
            raise TooManyUnreadable(
                f"None of {counted(tried + len(self.substitutes), 'training image')} can be read, {self._examples()}: "
                "is --train_data right?"
            )
        return []

    def __call__(self, batch: dict) -> dict:
        crops = [self._crop(record) for record in batch["image"]]
        readable = [crop for crop in crops if crop is not None]
        self._check(len(crops), len(crops) - len(readable))
        readable = readable or self._substitute(len(crops))
        if not readable:
            return {"pixel_values": []}
        substitutes = itertools.cycle(readable)
        items = {"pixel_values": [next(substitutes) if crop is None else crop for crop in crops]}
        if self.tokens is not None:
            items["image_tokens"] = list(self.tokens[self.epoch, batch["row"]].long())
        return items


def readable_rows(dataset: datasets.Dataset, transform: TrainTransform) -> datasets.Dataset:
    """The rows of a dataset, `with_pixels` of a transform, whose images can be decoded. All others are listed at once,
    where the transform lists such images, and their number is limited as in training.

    Raises:
        TooManyUnreadable: there are more; or some, and the transform has no list.
    """
    records = dataset.with_format(None)["image"]
    reasons = _unreadable(records, "training")
    if not reasons:
        return dataset
    names = [shown_path(records[number]) or f"image {number}" for number in reasons]
    examples, allowed = f"such as {', '.join(names[:3])}", 0
    if transform.skipped_list is not None:
        listing = SkippedImages(transform.skipped_list)
        for name, reason in zip(names, reasons.values()):
            listing.add(name, reason)
        examples += f" (all, with reasons: {transform.skipped_list})"
        allowed = transform.HANDFUL + transform.max_unreadable_share * len(records)
    said = f"{len(reasons)} of the {len(records)} training images cannot be read, {examples}"
    if len(reasons) > allowed or len(reasons) == len(records):
        raise TooManyUnreadable(f"{said}: remove or replace them, or allow more by --max_unreadable_share.")
    print(f"{said}: they are left out.", flush=True)
    return dataset.select([number for number in range(len(records)) if number not in reasons])


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
    if isinstance(transform, TrainTransform):
        transform.substitutes = list(dataset.select(sample_indices(len(dataset), 16, transform.seed))["image"])
    return dataset.with_transform(transform)


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    """Items with `pixel_values` (3, H, W), and `image_tokens` (h, w) if they are known -> batches of them."""
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}
