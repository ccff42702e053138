"""Images to the pixels that VQRAE takes, and back."""

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_transforms import to_pil_image
from transformers.image_utils import PILImageResampling


class VQRAEImageProcessor(TorchvisionBackend):
    """Shorter side resized (bicubic, antialiased), centre crop, pixels in [0, 1]. Nothing is normalised: the model does
    that inside. Transparent images are composited on white.

    Args:
        size (`dict`, defaults to `{"shortest_edge": 256}`): length of the shorter side in pixels.
        crop_size (`dict`, defaults to `{"height": 256, "width": 256}`): size of the centre crop in pixels.
    """

    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 256}
    default_to_square = False
    crop_size = {"height": 256, "width": 256}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = False
    do_convert_rgb = True

    @classmethod
    def for_image_size(cls, image_size: int) -> "VQRAEImageProcessor":
        """The processor of a model with `config.image_size` pixels a side."""
        return cls(size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size})

    def convert_to_rgb(self, image):
        """PIL image of any mode to RGB, on white where it is transparent. Other inputs pass through."""
        if not hasattr(image, "getbands"):
            return image
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            canvas = image.copy()
            canvas.paste((255, 255, 255, 255), (0, 0, *image.size))
            canvas.alpha_composite(image)
            image = canvas
        return image.convert("RGB")

    def postprocess(self, pixel_values: torch.Tensor) -> list:
        """Pixels from the model, (B, 3, H, W), nominally in [0, 1], to a list of B PIL images: clamped and rounded.

        Raises:
            ValueError: not a batch of images.
        """
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values must be (B, channels, height, width), got {tuple(pixel_values.shape)}.")
        pixels = (pixel_values.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        return [to_pil_image(image.numpy(), do_rescale=False) for image in pixels]


VQRAEImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["VQRAEImageProcessor"]
