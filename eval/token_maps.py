"""Tokens to look at: maps of them, codes and their neighbours, and grids with other tokens put in."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


@torch.no_grad()
def code_colors(model) -> np.ndarray:
    """A colour for each code, (codebook_size, 3) of uint8: near codes have near colours.

    Red, green and blue are the places of the codes along the first three principal directions of the codebook, as
    ranks of a normal distribution. (Features of DINOv2, arXiv 2304.07193, are commonly shown so.) Codes that differ in
    other directions alone look alike.

    Args:
        model: an [`ImageTokenizer`].
    """
    codes = _codes(model)
    codes = codes - codes.mean(0)
    _, directions = torch.linalg.eigh(codes.T @ codes)  # ascending
    directions = directions.flip(1)[:, :3]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    places = codes @ (directions * largest.sign())  # an eigenvector has no sign of its own
    places = places / places.square().mean(0).sqrt().clamp_min(1e-12)
    places = F.pad(places, (0, 3 - places.shape[1]))  # where codes have fewer than three dimensions
    return (torch.special.ndtr(places) * 255).round().to(torch.uint8).cpu().numpy()


def token_map(model, image_tokens: torch.Tensor, colors: np.ndarray | None = None) -> Image.Image:
    """A picture of the tokens of an image, to lie upon it: a square of `decoder_patch_size` pixels for each, in the
    colour of its code (`code_colors`).

    Args:
        model: an [`ImageTokenizer`].
        image_tokens: (h, w), integers in [0, codebook_size).
        colors: `code_colors(model)`, to compute them but once for many maps.

    Raises:
        ValueError: another shape, or tokens outside the codebook.
    """
    if image_tokens.ndim != 2:
        raise ValueError(f"image_tokens must be those of one image, (h, w), got {tuple(image_tokens.shape)}.")
    for token in (image_tokens.min(), image_tokens.max()):
        check_code(model, token.item())
    patch = model.config.decoder_patch_size
    colors = code_colors(model) if colors is None else colors
    colors = colors[image_tokens.cpu().numpy()]
    return Image.fromarray(colors.repeat(patch, 0).repeat(patch, 1))


def check_code(model, code: int) -> None:
    """Raises a ValueError for a code outside the codebook."""
    if not 0 <= code < model.config.codebook_size:
        raise ValueError(f"Code {code} is outside the codebook: choose one from 0 to {model.config.codebook_size - 1}.")


@torch.no_grad()
def neighbours(model, code: int, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes nearest to a code, by the L2 distance by which the quantizer chooses; itself comes first.

    Args:
        model: an [`ImageTokenizer`].
        code: in [0, codebook_size).
        count: how many beside itself; all, where there are fewer.

    Returns:
        codes, int64, and their distances, float64: (count + 1,), in ascending order.

    Raises:
        ValueError: a code outside the codebook.
    """
    check_code(model, code)
    codes = _codes(model)
    distances = torch.linalg.vector_norm(codes - codes[code], dim=1)
    distances[code] = -1  # before its duplicates
    distances, nearest = distances.topk(min(count + 1, len(codes)), largest=False)
    return nearest.cpu(), distances.clamp_min(0).cpu()


@torch.no_grad()
def code_pixels(model, codes: torch.Tensor) -> torch.Tensor:
    """What codes look like alone: a grid filled with each, decoded.

    Args:
        model: an [`ImageTokenizer`] in eval mode.
        codes: (N,), integers in [0, codebook_size).

    Returns:
        (N, 3, image_size, image_size), nominally in [0, 1].
    """
    side = model.config.grid_size
    return model.decode_image_tokens(codes.to(model.device)[:, None, None].expand(-1, side, side))


def replace_tokens(
    image_tokens: torch.Tensor, rectangle: tuple[int, int, int, int], by: int | torch.Tensor
) -> torch.Tensor:
    """A copy of tokens in which those of a rectangle are others.

    Args:
        image_tokens: (h, w).
        rectangle: its top row, left column, height and width, in tokens.
        by: a code; or the tokens (h, w) of another image, whose same rectangle is taken.

    Raises:
        ValueError: a rectangle that is empty or not inside the grid, or another grid.
    """
    top, left, height, width = rectangle
    rows, columns = image_tokens.shape
    if min(top, left) < 0 or min(height, width) < 1 or top + height > rows or left + width > columns:
        raise ValueError(
            f"The rectangle of {height} x {width} tokens at row {top}, column {left} is not inside the grid of {rows} "
            f"x {columns}: rows go from 0 to {rows - 1}, columns from 0 to {columns - 1}, and it must hold a token."
        )
    inside = slice(top, top + height), slice(left, left + width)
    if isinstance(by, torch.Tensor):
        if by.shape != image_tokens.shape:
            raise ValueError(f"The other image has {tuple(by.shape)} tokens, this one {tuple(image_tokens.shape)}.")
        by = by[inside]
    replaced = image_tokens.clone()
    replaced[inside] = by
    return replaced


def _codes(model) -> torch.Tensor:
    """All codes as the quantizer compares them, (codebook_size, latent_size), float64."""
    return model.quantizer.get_codebook_entry(torch.arange(model.config.codebook_size, device=model.device)).double()
