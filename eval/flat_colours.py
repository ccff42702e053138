"""What a tokenizer makes of images of one colour."""

import torch
from tqdm import tqdm

from eval.protocol import Protocol


LEVELS = (0, 64, 128, 191, 255)  # of red, green and blue


def flat_colours() -> torch.Tensor:
    """The 125 colours of five levels of red, green and blue each, evenly spaced: (125, 3), uint8."""
    levels = torch.tensor(LEVELS, dtype=torch.uint8)
    return torch.cartesian_prod(levels, levels, levels)


@torch.inference_mode()
def measure_flat_colours(
    reconstruct, protocol: Protocol, size: int, batch_size: int, device: torch.device
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Error and unevenness of the reconstructions of flat colours.

    Args:
        reconstruct: as for `evaluate`.
        protocol: which rounds to 8 bits.
        size: side of the images in pixels.
        batch_size: in images.
        device: of the tokenizer.

    Returns:
        `flat_colours_error`, the mean absolute error of a pixel, and `flat_colours_deviation`, the standard deviation
        over the pixels of an image, both averaged over red, green and blue and over colours, in levels of 255; `None`
        where a reconstruction is not finite. Then the reason for these, by name.
    """
    errors, deviations, broken = [], [], 0
    with tqdm(total=len(flat_colours()), desc="Flat colours", unit="image") as bar:
        for colours in flat_colours().split(batch_size):
            originals = colours[:, :, None, None].expand(-1, -1, size, size).to(device)
            reconstructions = reconstruct(originals / 255)[0].float()
            broken += (~reconstructions.isfinite().flatten(1).all(1)).sum().item()
            real, fake = (x.double() for x in protocol.eight_bits(originals, reconstructions.nan_to_num()))
            errors.append((fake - real).abs().flatten(1).mean(1))
            deviations.append(fake.flatten(2).std(2, unbiased=False).mean(1))
            bar.update(len(colours))
    metrics = {"flat_colours_error": torch.cat(errors), "flat_colours_deviation": torch.cat(deviations)}
    if broken:
        reason = f"not finite: the reconstructions of {broken} of {len(flat_colours())} colours"
        return dict.fromkeys(metrics), dict.fromkeys(metrics, reason)
    return {name: values.mean().item() for name, values in metrics.items()}, {}
