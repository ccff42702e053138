"""Images to the pixels that VQRAE takes, and back."""

import torch
from transformers import AutoImageProcessor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_transforms import to_pil_image

# PIL, httpx, ... as well: what is trusted with a checkpoint imports nothing that transformers does not
from transformers.image_utils import (
    PIL,
    BytesIO,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    base64,
    httpx,
    infer_channel_dimension_format,
    to_numpy_array,
)


try:
    from .configuration_simvq import VQRAEConfig
except ImportError:
    if __package__:  # a real error inside the configuration must not be masked
        raise
    from configuration_simvq import VQRAEConfig


# Not all that Pillow knows: for some it starts other programs (Ghostscript for EPS), and others are no pictures that
# anybody trains on (weather maps, films, textures of games). HEIF is read where a plugin of Pillow for it is.
FORMATS = {"AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}

# How many times as long as the other a side may be: of a longer one, all would be resized, and little kept by the crop.
THINNEST = 200


def read_image(
    source: str | bytes, name: str, transparency: str = "white", turned_by_exif: bool = True
) -> "PIL.Image.Image":
    """An encoded image -> PIL image in 8-bit RGB, see `to_rgb`; of an animation, or of several pages, the first.

    Args:
        source: path of a file, or its content.
        name: for the error.
        transparency, turned_by_exif: see `to_rgb`.

    Raises:
        ValueError: it is not an image of one of `FORMATS`, is damaged, or too thin; named.
    """
    PIL.Image.init()
    try:
        file = BytesIO(source) if isinstance(source, bytes) else source
        with PIL.Image.open(file, formats=sorted(FORMATS & PIL.Image.OPEN.keys())) as image:
            image.load()
            return to_rgb(image, transparency, turned_by_exif)
    except Exception as error:  # decoders raise whatever comes to pass in a damaged file
        raise ValueError(f"Cannot read the image {name}: {str(error).rstrip('.')}. Remove or replace it.") from error


def to_rgb(
    image: ImageInput,
    transparency: str = "white",
    turned_by_exif: bool = True,
    input_data_format: str | None = None,
) -> "PIL.Image.Image":
    """Any image as a PIL image in 8-bit RGB. This is the one place that decides how: the processor, training,
    evaluation and the demo all come here.

    - More than 8 bits are scaled: 65,535 of 16 bits becomes 255, rounded. (Of files in colour with 16 bits, Pillow
      itself keeps the upper 8.) Where the type does not tell the range, the values do: whole numbers up to 255 are
      levels of 8 bits, larger ones of 16 bits; floats up to 1 are in [0, 1], larger ones are levels likewise. So a
      float image in [0, 255] with nothing above 1 is taken for one in [0, 1]: give black ones as uint8.
    - What is transparent is composited on white, or loses its alpha.
    - A PIL image is turned as its EXIF says, if that can be read.
    - A colour profile (ICC) is left alone: the numbers are taken as they are, as if they were sRGB.

    Args:
        image: PIL image of any mode; or array, (H, W), (C, H, W) or (H, W, C), with C = 1 (grey), 2 (grey, alpha), 3 or
            4 (RGB, alpha), of bool, whole numbers, or floats. Tensors of other devices come to the CPU.
        transparency: "white", or "dropped".
        turned_by_exif: `False` leaves it as it lies in the file.
        input_data_format: "channels_first" or "channels_last". `None`: where there are 1, 3 or 4 of them, first before
            last.

    Raises:
        ValueError: no image by its shape, values out of range (such as normalised ones), or a side more than
            `THINNEST` times the other: 10,000 x 1 px would become 2,240,000 x 224.
    """
    if not isinstance(image, PIL.Image.Image):
        image = _array_to_pil(image, input_data_format)
    elif turned_by_exif:
        try:
            image = PIL.ImageOps.exif_transpose(image)
        except Exception:  # of many kinds: broken EXIF is no broken image
            pass
    if max(image.size) > THINNEST * min(image.size):
        raise ValueError(
            f"An image of {image.width:,} x {image.height:,} px is too thin: resized for a model it would fill the "
            f"memory. One side may be {THINNEST} times the other at most."
        )
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # Pillow would clip at 255
        values, clear = _to_tensor(to_numpy_array(image)), image.info.get("transparency")
        image = PIL.Image.fromarray(_to_8_bits(values).numpy())
        if clear is not None:  # a level of 16 bits
            image.putalpha(PIL.Image.fromarray((255 * (values.double() != clear)).to(torch.uint8).numpy()))
    if image.mode == "La":  # the one mode with alpha that Pillow does not convert to RGBA
        image = image.convert("LA")
    if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        image = image.convert("RGBA")
        if transparency == "white":
            canvas = PIL.Image.new("RGBA", image.size, "white")
            canvas.alpha_composite(image)
            image = canvas
    image = image.convert("RGB")  # a copy
    image.info.clear()  # what it says has been done, and must not be done again
    return image


def _to_tensor(array: ImageInput) -> torch.Tensor:
    """On the CPU; of numpy's arrays torch takes neither foreign byte orders nor strides backwards."""
    if isinstance(array, torch.Tensor):
        return array.detach().cpu()
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


def _array_to_pil(array: ImageInput, input_data_format: str | None) -> "PIL.Image.Image":
    array = _to_tensor(array)
    shape = tuple(array.shape)
    if array.ndim == 3:
        if input_data_format is None:
            known = (1, 3, 4) if {shape[0], shape[2]} & {1, 3, 4} else (2,)
            input_data_format = infer_channel_dimension_format(array, num_channels=known)
        if input_data_format == ChannelDimension.FIRST:
            array = array.permute(1, 2, 0)
    else:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or not array.numel():
        raise ValueError(f"An image must be (H, W), (C, H, W) or (H, W, C) with C from 1 to 4, got {shape}.")
    return PIL.Image.fromarray(_to_8_bits(array[..., 0] if array.shape[2] == 1 else array).numpy())


def _to_8_bits(values: torch.Tensor) -> torch.Tensor:
    """Values of any type to uint8, see `to_rgb`."""
    if values.dtype == torch.uint8:
        return values
    numbers = values.double()
    low, high = numbers.min().item(), numbers.max().item()
    if values.dtype == torch.bool:
        top = 1
    elif values.dtype == torch.uint16:
        top = 65535
    elif values.is_floating_point() and high <= 1:
        top = 1
    else:
        top = 255 if high <= 255 else 65535
    if not 0 <= low <= high <= top:  # nor NaN
        raise ValueError(
            f"The values of an image must be in [0, 1], [0, 255] or [0, 65535], got [{low:g}, {high:g}]: undo what "
            "normalised them, or clamp them."
        )
    return (numbers * (255 / top)).round().to(torch.uint8)


class VQRAEImageProcessor(TorchvisionBackend):
    """Shorter side resized (bicubic, antialiased), centre crop, pixels in [0, 1]. Nothing is normalised: the model does
    that inside.

    Takes PIL images of any mode, numpy arrays and torch tensors, grey, RGB or with alpha, channels first or last, one
    or a batch; paths, URLs and base64 strings; and lists of these, mixed or nested. All become 8-bit RGB first, by
    `to_rgb`, so that one picture has the same pixels in whichever form it comes. Floats may be in [0, 1] or [0, 255],
    each image by itself. With `do_rescale=False` those in [0, 1] stay there, and all else becomes levels, 0 to 255.

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

    def fetch_images(self, image_url_or_urls):
        """Paths of files, URLs (http, https), base64 strings and `data:image/` URIs to PIL images in RGB; lists of them
        to lists. Images pass through.

        Raises:
            ValueError: none of these, or no image there.
        """
        if not isinstance(image_url_or_urls, str) and not hasattr(image_url_or_urls, "__fspath__"):
            return super().fetch_images(image_url_or_urls)
        source = str(image_url_or_urls)
        name = source if len(source) <= 200 else source[:200] + "..."
        if source.startswith(("http://", "https://")):
            try:
                source = httpx.get(source, follow_redirects=True, timeout=60).raise_for_status().content
            except httpx.HTTPError as error:
                raise ValueError(f"Cannot fetch the image {name}: {error}") from error
            return read_image(source, name)
        try:
            return read_image(source, name)
        except ValueError as error:
            cause = error.__cause__
            if not getattr(cause, "errno", None) or isinstance(cause, (IsADirectoryError, PermissionError)):
                raise  # there is something of this name
        encoded = source.split(",", 1)[-1] if source.startswith("data:image/") else source
        try:
            source = base64.b64decode("".join(encoded.split()), validate=True)
        except ValueError:
            raise ValueError(
                f"images: '{name}' is no file, URL (http, https) or base64 string: is the path right?"
            ) from None
        return read_image(source, name)

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list:
        """Any nesting of images and batches to one list of images. (transformers' own refuses arrays (H, W).)"""
        if not (images := self._flat(self.fetch_images(images), expected_ndims)):
            raise ValueError("images: there are none. A list needs at least one; leave out a batch without images.")
        return images

    def _flat(self, images, expected_ndims: int) -> list:
        if isinstance(images, (list, tuple)):
            return [image for part in images for image in self._flat(part, expected_ndims)]
        return list(images) if getattr(images, "ndim", 0) == expected_ndims + 1 else [images]

    def convert_to_rgb(self, image, input_data_format: str | None = None) -> "PIL.Image.Image":
        """See `to_rgb`."""
        return to_rgb(image, input_data_format=input_data_format)

    def process_image(
        self, image, do_convert_rgb=None, input_data_format=None, device=None, do_rescale=None, **kwargs
    ) -> torch.Tensor:
        """One image to (3, H, W), levels in uint8, on `device`, or that of the image."""
        if not do_convert_rgb:  # left to the caller
            return super().process_image(image, do_convert_rgb, input_data_format, device, **kwargs)
        pixels = torch.from_numpy(to_numpy_array(self.convert_to_rgb(image, input_data_format)))
        pixels = pixels.permute(2, 0, 1).contiguous()
        if not (do_rescale or isinstance(image, PIL.Image.Image)) and "float" in str(image.dtype) and image.max() <= 1:
            pixels = pixels / 255
        return pixels.to(device or getattr(image, "device", "cpu"))

    def postprocess(self, pixel_values: torch.Tensor) -> list:
        """Pixels from the model, (B, 3, H, W), nominally in [0, 1], to a list of B PIL images: clamped and rounded.

        Raises:
            ValueError: not a batch of images.
        """
        if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 4:
            got = tuple(pixel_values.shape) if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
            raise ValueError(
                f"pixel_values must be a tensor (B, channels, height, width), got {got}: pass "
                "decode(...).decoded_pixel_values."
            )
        pixels = (pixel_values.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        return [to_pil_image(image.numpy(), do_rescale=False) for image in pixels]


VQRAEImageProcessor.register_for_auto_class("AutoImageProcessor")
if not __package__:
    processors = {"torchvision": VQRAEImageProcessor}
    AutoImageProcessor.register(VQRAEConfig, image_processor_classes=processors, exist_ok=True)

__all__ = ["VQRAEImageProcessor"]
