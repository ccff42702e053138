"""Pictures of reconstructions."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import make_grid
from transformers.image_transforms import to_pil_image

from eval.files import write_whole
from eval.metrics import to_uint8


def rows_of(batches: Sequence[torch.Tensor], columns: int = 8) -> Image.Image:
    """A picture with, in turn, a row of each batch: originals, below them their reconstructions, and so on.

    Args:
        batches: of the same images, each (B, 3, H, W), nominally in [0, 1].
        columns: images in a row.
    """
    batches = [to_uint8(batch.cpu()) for batch in batches]
    rows = [
        image
        for start in range(0, len(batches[0]), columns)
        for batch in batches
        for image in _filled(batch[start : start + columns], columns)
    ]
    grid = make_grid(torch.stack(rows), nrow=columns, padding=2, pad_value=255)
    return to_pil_image(grid.numpy(), do_rescale=False)


def save_rows(batches: Sequence[torch.Tensor], path: str | Path, columns: int = 8) -> None:
    """Writes `rows_of` the batches as a PNG; its folder is made."""
    picture = rows_of(batches, columns)
    write_whole(Path(path), lambda file: picture.save(file, format="PNG"))


def as_html(picture: Image.Image) -> str:
    """An `<img>` that holds the picture itself."""
    png = io.BytesIO()
    picture.save(png, format="PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'


def _filled(images: torch.Tensor, columns: int) -> torch.Tensor:
    """A row of `columns` images, white where there are fewer."""
    missing = columns - len(images)
    return torch.cat([images, images.new_full((missing, *images.shape[1:]), 255)]) if missing else images
