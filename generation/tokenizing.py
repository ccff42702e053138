"""From images to rows of tokens: what the command, `datasets.map` and Ray Data have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from transformers.image_utils import PILImageResampling
from transformers.utils import logging

from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import ImageTokenizer
from reading.images import decode_image, image_name, shown_path
from reading.models import exact_float32, load_any, load_processor, tokenizer_hash


logger = logging.get_logger(__name__)

MOST_BATCHES = 8  # of images in their own sizes, that wait for others of the same size


def token_dtype(codebook_size: int) -> type[np.unsignedinteger]:
    """The smallest that holds all tokens: uint16 up to 65,536 codes, else uint32."""
    return np.uint16 if codebook_size <= 2**16 else np.uint32


def row_features(codebook_size: int, label=None, text=None) -> datasets.Features:
    """The columns of a dataset of tokens.

    Args:
        codebook_size: see `token_dtype`.
        label, text: what the source has as features of these names (`ClassLabel`, `Value`); `None`: it has none.
    """
    names = {
        "key": datasets.Value("string"),
        "image_tokens": datasets.List(datasets.Value(np.dtype(token_dtype(codebook_size)).name)),
        "height": datasets.Value("int32"),
        "width": datasets.Value("int32"),
        "crop": datasets.Value("int8"),
        "flipped": datasets.Value("bool"),
    }
    return datasets.Features(names | {k: v for k, v in (("label", label), ("text", text)) if v is not None})


@dataclass(frozen=True)
class Views:
    """What of an image is tokenized. Every view of an image has the same size.

    One crop: the shorter side resized to `image_size`, and the centre, as the image processor has it. Ten crops, as
    LlamaGen and RAR have them: the shorter side resized to `int(image_size * ten_crop_ratio)`, the centre square of
    that, and of it the four corners and the centre, each also mirrored. In its own size: nothing is resized; of each
    side, what is more than a multiple of the patch is cut off, half at either end.

    Args:
        patch_size: side of a token in pixels.
        image_size: side of the square crops, a multiple of the patch. `None`: every image in its own size.
        crops: 1 or 10.
        ten_crop_ratio: see above. `None` for one crop.
        flip: a single crop is also mirrored.
        resample: filter of the resize.

    Raises:
        ValueError: an argument that is none of these, or has no effect beside the others.
    """

    patch_size: int
    image_size: int | None
    crops: int = 1
    ten_crop_ratio: float | None = None
    flip: bool = False
    resample: int = PILImageResampling.BICUBIC

    def __post_init__(self) -> None:
        if self.image_size is not None and (self.image_size < 1 or self.image_size % self.patch_size):
            raise ValueError(
                f"image_size is {self.image_size}: it must be a positive multiple of the tokenizer's patch, "
                f"{self.patch_size} px."
            )
        if self.crops not in (1, 10):
            raise ValueError(f"crops must be 1 or 10, got {self.crops}.")
        if self.crops == 1 and self.ten_crop_ratio is not None:
            raise ValueError("ten_crop_ratio has no effect: it is for crops=10.")
        if self.crops == 10 and self.image_size is None:
            raise ValueError("Ten crops of images in their own sizes are not defined: give an image_size.")
        if self.crops == 10 and self.flip:
            raise ValueError("flip has no effect: of ten crops, five are the mirrored ones already.")
        if self.crops == 10 and not (self.ten_crop_ratio or 0) >= 1:
            raise ValueError(f"ten_crop_ratio must be at least 1 for crops=10, got {self.ten_crop_ratio}.")

    @cached_property
    def places(self) -> list[tuple[int, bool]]:
        """`crop` and `flipped` of each view: 0 to 4 are top left, top right, bottom left, bottom right, centre."""
        return [
            (crop, flipped)
            for flipped in ((False, True) if self.flip or self.crops == 10 else (False,))
            for crop in range(5 if self.crops == 10 else 1)
        ]

    @cached_property
    def _processor(self) -> VQRAEImageProcessor:
        side = self.image_size if self.crops == 1 else int(self.image_size * self.ten_crop_ratio)
        processor = VQRAEImageProcessor.for_image_size(side)
        processor.resample = self.resample
        return processor

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Image in 8-bit RGB to (views, 3, height, width), uint8.

        Raises:
            ValueError: it is smaller than a patch.
        """
        if self.image_size is None:
            width, height = (side // self.patch_size * self.patch_size for side in image.size)
            if not (width and height):
                raise ValueError(f"{image.width} x {image.height} px are less than a patch of {self.patch_size} px.")
            left, top = (image.width - width) // 2, (image.height - height) // 2
            pixels = np.asarray(image)[top : top + height, left : left + width]
            crops = [torch.from_numpy(pixels.transpose(2, 0, 1).copy())]
        else:
            pixels = self._processor(image, do_rescale=False, return_tensors="pt").pixel_values[0]
            crops = [pixels]
            if self.crops == 10:
                size, end = self.image_size, pixels.shape[-1] - self.image_size
                # torchvision's centre crop, on which LlamaGen's ten crops stand, rounds a half to the even number
                corners = [(0, 0), (0, end), (end, 0), (end, end), (round(end / 2), round(end / 2))]
                crops = [pixels[:, top : top + size, left : left + size] for top, left in corners]
        return torch.stack([crops[crop].flip(-1) if flipped else crops[crop] for crop, flipped in self.places])


@dataclass
class Prepared:
    """Some images of the source, in order, as a worker hands them over.

    Args:
        images: of each its `key`, `label`, `text`; `size`, the (height, width) of its views; or, where it could not be
            read, the `reason`, in place of the size.
        views: of all that have the same size, (images, views, 3, height, width), uint8, in order.
    """

    images: list[dict]
    views: dict[tuple[int, int], torch.Tensor]

    @property
    def num_unreadable(self) -> int:
        return sum("reason" in image for image in self.images)


def prepare(records: list[dict], views: Views) -> Prepared:
    """Decodes and crops images.

    Args:
        records: with an `image` as `datasets.Image(decode=False)` has it, and, where the source has them, `key`,
            `label`, `text`. Without a key the image's name is the key, see `image_name`.
        views: of each image.
    """
    images, found = [], {}
    for record in records:
        encoded = record["image"]
        image = {name: record.get(name) for name in ("key", "label", "text")}
        if image["key"] is None:
            image["key"] = image_name(encoded).strip() if encoded else ""
        images.append(image)
        try:
            pixels = views(decode_image(encoded))
        except ValueError as error:
            reason = str(error)
            for path in filter(None, ((encoded or {}).get("path"), shown_path(encoded))):  # of this machine
                reason = reason.replace(path, image["key"])
            image["reason"] = " ".join(reason.split())
        else:
            image["size"] = tuple(pixels.shape[-2:])
            found.setdefault(image["size"], []).append(pixels)
    return Prepared(images, {size: torch.stack(pixels) for size, pixels in found.items()})


class Collected:
    """Rows of images that come a few at a time, tokenized in batches of one size.

    The batches depend on the images and their order alone. Where sizes differ, images wait for others of their size;
    where `MOST_BATCHES` batches wait, the size with the most of them goes first.

    Args:
        tokenize: (B, 3, height, width) of uint8 to tokens, (B, height, width in tokens).
        views: of each image.
        most_pixels: of a batch, height times width of its images together; one image may have more.
        features: of the rows.
    """

    def __init__(
        self,
        tokenize: Callable[[torch.Tensor], np.ndarray],
        views: Views,
        most_pixels: int,
        features: datasets.Features,
    ) -> None:
        self.tokenize, self.views, self.most_pixels, self.features = tokenize, views, most_pixels, features
        self.num_images, self.num_tokens = 0, 0
        self.unreadable = []  # [key, reason] of each
        self._rows = []
        self._waiting = {}  # by size: rows and their pixels

    def add(self, prepared: Prepared) -> None:
        """The next images."""
        stacks = {size: iter(views) for size, views in prepared.views.items()}
        for image in prepared.images:
            self.num_images += 1
            if "reason" in image:
                self.unreadable.append([image["key"], image["reason"]])
                continue
            size = image["size"]
            for (crop, flipped), pixels in zip(self.views.places, next(stacks[size])):
                row = {name: image[name] for name in ("key", "label", "text")} | {"crop": crop, "flipped": flipped}
                self._rows.append(row)
                self._waiting.setdefault(size, []).append((row, pixels))
                if len(self._waiting[size]) >= self._batch_size(size):
                    self._tokenize(size)
            if sum(len(rows) * h * w for (h, w), rows in self._waiting.items()) > MOST_BATCHES * self.most_pixels:
                self._tokenize(max(self._waiting, key=lambda size: len(self._waiting[size]) * size[0] * size[1]))

    def _batch_size(self, size: tuple[int, int]) -> int:
        return max(1, self.most_pixels // (size[0] * size[1]))

    def _tokenize(self, size: tuple[int, int]) -> None:
        waiting = self._waiting.pop(size)
        tokens = self.tokenize(torch.stack([pixels for _, pixels in waiting]))
        self.num_tokens += tokens.size
        for (row, _), grid in zip(waiting, tokens):
            row["height"], row["width"] = grid.shape
            row["image_tokens"] = grid.ravel()

    def finish(self) -> pa.Table:
        """All rows, in the order of the images."""
        for size in list(self._waiting):
            self._tokenize(size)
        schema = self.features.arrow_schema
        tokens = [row.pop("image_tokens") for row in self._rows]
        ends = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
        values = pa.array(np.concatenate(tokens) if tokens else [], schema.field("image_tokens").type.value_type)
        columns = {
            name: pa.array([row[name] for row in self._rows], schema.field(name).type)
            for name in schema.names
            if name != "image_tokens"
        }
        columns["image_tokens"] = pa.ListArray.from_arrays(pa.array(ends), values, schema.field("image_tokens").type)
        return pa.table([columns[name] for name in schema.names], schema)


class TokenRows:
    """A batch of images to rows of tokens: `TokenRows(name)(table)`.

    As it is, a function for `dataset.with_format("arrow").map(..., batched=True)` and a class for Ray Data's
    `map_batches(..., batch_format="pyarrow")`. A batch is tokenized in parts of `batch_size`. An image that cannot be
    read gives no row, and is named in the log.

    Args:
        model_name_or_path, revision: a tokenizer of either kind: a folder, or a repository of the hub.
        image_size: side of the crops in pixels. `None`: the model's.
        native_size: every image in its own size instead.
        crops, ten_crop_ratio, flip: see [`Views`].
        batch_size: views at a time. In their own sizes, as many as have no more pixels than these would have.
        dtype: of the encoder, "float32" or "bfloat16". What chooses codes stays in fp32.
        device: `None`: a GPU where there is one.
        label, text: features of these columns, where the images have them, see `row_features`.

    Raises:
        ValueError: the model cannot be loaded; or see [`Views`].
    """

    def __init__(
        self,
        model_name_or_path: str,
        revision: str | None = None,
        *,
        image_size: int | None = None,
        native_size: bool = False,
        crops: int = 1,
        ten_crop_ratio: float | None = None,
        flip: bool = False,
        batch_size: int = 32,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        label=None,
        text=None,
    ) -> None:
        if native_size and image_size is not None:
            raise ValueError(f"image_size {image_size} has no effect beside native_size: give one of them.")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        exact_float32()
        self.model = load_any(model_name_or_path, torch.float32, revision=revision).to(device)
        if not isinstance(self.model, ImageTokenizer):
            raise ValueError(
                f"{model_name_or_path} is a {type(self.model).__name__}, not a tokenizer of this repository."
            )
        self.model_name_or_path, self.dtype, self.batch_size = model_name_or_path, dtype, batch_size
        self.revision = getattr(self.model.config, "_commit_hash", None) or revision
        config = self.model.config
        side = image_size or config.image_size
        hub = {} if revision is None else {"revision": revision}
        self.views = Views(
            config.decoder_patch_size,
            None if native_size else side,
            crops,
            ten_crop_ratio,
            flip,
            int(load_processor(model_name_or_path, side, hub).resample),
        )
        self.most_pixels = batch_size * side**2
        self.features = row_features(config.codebook_size, label, text)
        self.tokenizer_hash = tokenizer_hash(self.model)
        self.model.to(getattr(torch, dtype))

    @torch.inference_mode()
    def tokenize(self, views: torch.Tensor) -> np.ndarray:
        """(B, 3, height, width) of uint8 to tokens, (B, height, width in tokens)."""
        pixels = views.to(self.model.device, non_blocking=True).float() * (1 / 255)
        tokens = self.model.get_image_tokens(pixels).to(torch.int32).cpu().numpy()
        return tokens.astype(token_dtype(self.model.config.codebook_size))

    def collect(self) -> Collected:
        """Takes images a few at a time, and gives their rows at the end."""
        return Collected(self.tokenize, self.views, self.most_pixels, self.features)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows of a batch with the column `image`, encoded (`bytes`, `path`), and perhaps `key`, `label` and `text`.

        Raises:
            ValueError: it is no Arrow table.
        """
        if not isinstance(batch, pa.Table):
            raise ValueError(
                f"A batch must be an Arrow table, got {type(batch).__name__}: dataset.with_format('arrow'), or "
                "batch_format='pyarrow' in Ray."
            )
        collected = self.collect()
        collected.add(prepare(batch.to_pylist(), self.views))
        for key, reason in collected.unreadable:
            logger.warning(f"No row of {key}: {reason}")
        return collected.finish()
