"""Images as a protocol crops them, in batches."""

import torch
from PIL import Image

from reading.images import decode_image


def different_sizes(one, other) -> str:
    """The message of an error."""
    return f"Images of different sizes, {tuple(one)} and {tuple(other)} px: pass --image_size to crop them."


class CroppedImages(torch.utils.data.Dataset):
    """Images as a protocol crops them; or pairs of them.

    Items are dicts: `index`; `original`, (3, H, W) of uint8; `reconstruction` likewise, where there are files of them;
    or, for an image that cannot be read, `error` in place of both.

    Args:
        data: with a column `image`, see `open_source`.
        protocol: see [`Protocol`].
        size: side of the crops in pixels; `None`: as the files are, all of the same size.
        reconstructions: likewise, in the order of `data`.
    """

    def __init__(self, data, protocol, size: int | None, reconstructions=None) -> None:
        self.data, self.reconstructions = data, reconstructions
        self.protocol, self.size = protocol, size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        try:
            image = self._decode(self.data[index])
            item = {"index": index, "original": self._tensor(image, self.size)}
            if self.reconstructions is not None:
                fake = self._decode(self.reconstructions[index])
                if fake.size != image.size and fake.size != (self.size, self.size):
                    raise RuntimeError(
                        f"{self.reconstructions[index]['image']['path']} is {fake.size} px, its original {image.size}: "
                        "a reconstruction must have the size of its original, before or after the crop "
                        f"(--image_size, now {self.size})."
                    )
                item["reconstruction"] = self._tensor(fake, self.size if fake.size == image.size else None)
            return item
        except ValueError as error:
            return {"index": index, "error": str(error)}

    def _decode(self, item: dict) -> Image.Image:
        return decode_image(item["image"], self.protocol.turned_by_exif, self.protocol.transparency)

    def _tensor(self, image: Image.Image, size: int | None) -> torch.Tensor:
        return torch.from_numpy(self.protocol.crop(image, size).copy()).permute(2, 0, 1).contiguous()


def collate_images(items: list[dict]) -> dict:
    """Items of [`CroppedImages`] to a batch: tensors (B, 3, H, W), B the number of those that could be read; `index` of
    those; `skipped`, pairs of index and message.

    Raises:
        ValueError: images of different sizes.
    """
    read = [item for item in items if "error" not in item]
    sizes = sorted({tuple(item["original"].shape[1:]) for item in read})
    if len(sizes) > 1:
        raise ValueError(different_sizes(*sizes[:2]))
    batch = {
        "index": [item["index"] for item in read],
        "skipped": [(item["index"], item["error"]) for item in items if "error" in item],
    }
    for name in ("original", "reconstruction"):
        if read and name in read[0]:
            batch[name] = torch.stack([item[name] for item in read])
    return batch
