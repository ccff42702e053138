"""Images in every form that they come in, as 8-bit RGB: the processor, and the reading of files."""

import base64
import io
import shutil
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from eval.protocol import Protocol
from image_processing_simvq import FORMATS, VQRAEImageProcessor, to_rgb
from reading.files import dataset_of_files, find_images
from reading.images import EXTENSIONS, decode_image, image_name
from reading.sources import load_images
from tokenizer_simvq import VQRAEDecoderOutput


SIDE = 32


@pytest.fixture
def processor():
    return VQRAEImageProcessor.for_image_size(SIDE)  # images of this size are neither resized nor cropped


@pytest.fixture
def picture():
    """(32, 32, 3), uint8, with all of 0 to 255."""
    return (
        np.random.default_rng(0).permutation(np.arange(SIDE * SIDE * 3) % 256).astype(np.uint8).reshape(SIDE, SIDE, 3)
    )


def pixels(processor, images, **options):
    return processor(images, return_tensors="np", **options).pixel_values


def levels(image):
    """PIL image -> (H, W, 3), int64, by the one function."""
    assert to_rgb(image).mode == "RGB"
    return np.asarray(to_rgb(image)).astype(np.int64)


def saved(image, name="image.png", **options):
    """What a file of the image is opened as."""
    file = io.BytesIO()
    image.save(file, format=Image.registered_extensions()[Path(name).suffix], **options)
    return decode_image({"bytes": file.getvalue(), "path": name})


# The processor --------------------------------------------------------------------------------------------------------

FORMS = {
    "PIL": Image.fromarray,
    "numpy, channels last": lambda x: x,
    "numpy, channels first": lambda x: x.transpose(2, 0, 1),
    "torch, channels last": torch.from_numpy,
    "torch, channels first": lambda x: torch.from_numpy(x).permute(2, 0, 1),
    "batch of numpy": lambda x: x[None],
    "batch of torch, channels first": lambda x: torch.from_numpy(x).permute(2, 0, 1)[None],
    "numpy, strides backwards": lambda x: x[::-1].copy()[::-1],
    "int64": lambda x: x.astype(np.int64),
    "torch, int64": lambda x: torch.from_numpy(x).long(),
    "float64 in [0, 255]": lambda x: x.astype(np.float64),
    "float32 in [0, 1]": lambda x: x.astype(np.float32) / 255,
    "torch, float32 in [0, 255]": lambda x: torch.from_numpy(x).float(),
    "torch, float32 in [0, 1]": lambda x: (torch.from_numpy(x).float() / 255).requires_grad_(),
    "torch, bfloat16 in [0, 255]": lambda x: torch.from_numpy(x).bfloat16(),
    "float16 in [0, 1]": lambda x: (x / 255).astype(np.float16),
    "uint16": lambda x: x.astype(np.uint16) * 257,
    "uint16, big-endian": lambda x: (x.astype(np.uint16) * 257).astype(">u2"),
    "torch, uint16": lambda x: torch.from_numpy(x.astype(np.uint16) * 257),
    "RGBA, opaque": lambda x: np.dstack([x, np.full_like(x[..., 0], 255)]),
    "list": lambda x: [x],
    "nested list": lambda x: [[Image.fromarray(x)]],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_has_the_same_pixels_in_every_form(processor, picture, form):
    expected = picture.transpose(2, 0, 1)[None] / 255
    np.testing.assert_allclose(pixels(processor, FORMS[form](picture)), expected, atol=1e-6)


GREY_FORMS = {
    "PIL": Image.fromarray,
    "(H, W)": lambda x: x,
    "(H, W) of torch": torch.from_numpy,
    "(H, W, 1)": lambda x: x[..., None],
    "(1, H, W)": lambda x: x[None],
    "(H, W) in [0, 1]": lambda x: torch.from_numpy(x) / 255,
    "list of (H, W)": lambda x: [x],
    "(H, W, 2), opaque": lambda x: np.dstack([x, np.full_like(x, 255)]),
}


@pytest.mark.parametrize("form", GREY_FORMS)
def test_grey_has_three_equal_channels(processor, picture, form):
    grey = np.ascontiguousarray(picture[..., 0])
    expected = np.broadcast_to(grey / 255, (1, 3, SIDE, SIDE))
    np.testing.assert_allclose(pixels(processor, GREY_FORMS[form](grey)), expected, atol=1e-6)


@pytest.mark.parametrize("scale", [255, 1])
@pytest.mark.parametrize("last", [True, False])
def test_alpha_of_arrays_is_composited_on_white(processor, picture, scale, last):
    alpha = np.ascontiguousarray(picture[::-1, :, :1])
    image = np.concatenate([picture, alpha], axis=2)
    if scale == 1:
        image = image / np.float32(255)
    image = torch.from_numpy(image if last else image.transpose(2, 0, 1))
    expected = picture / 255 * (alpha / 255) + 1 - alpha / 255
    np.testing.assert_allclose(pixels(processor, image)[0].transpose(1, 2, 0), expected, atol=1 / 255)


def test_layout_can_be_told_where_the_shape_does_not(processor):
    image = np.zeros((3, SIDE, 3), np.uint8)
    image[0] = 255
    options = {"do_resize": False, "do_center_crop": False}
    first = pixels(processor, image, input_data_format="channels_first", **options)
    last = pixels(processor, image, input_data_format="channels_last", **options)
    assert first.shape == (1, 3, SIDE, 3) and first[0, 0].min() == 1 and first[0, 1:].max() == 0
    assert last.shape == (1, 3, 3, SIDE) and last[0, :, 0].min() == 1 and last[0, :, 1:].max() == 0


def test_forms_and_sizes_mix_in_a_list(processor, picture):
    images = [picture, Image.fromarray(picture).resize((50, 40)), picture[..., 0], torch.from_numpy(picture) / 255]
    together = pixels(processor, images)
    assert together.shape == (4, 3, SIDE, SIDE)
    for image, alone in zip(images, together):
        np.testing.assert_array_equal(pixels(processor, image)[0], alone)


def test_without_rescale_floats_in_0_1_stay_and_all_else_is_levels(processor, picture):
    expected = picture.transpose(2, 0, 1)[None]
    for image, scale in ((picture / 255, 255), (picture.astype(float), 1), (picture, 1), (Image.fromarray(picture), 1)):
        np.testing.assert_allclose(pixels(processor, image, do_rescale=False) * scale, expected, atol=1e-4)


@pytest.mark.parametrize(
    "image, message",
    [
        (np.random.default_rng(0).normal(size=(3, SIDE, SIDE)), "normalised"),
        (np.full((SIDE, SIDE, 3), np.nan), "nan"),
        (np.full((SIDE, SIDE, 3), 1e6), "1e.06"),
        (np.zeros((SIDE, SIDE, 5)), "channel dimension"),
        (np.zeros((0, SIDE, 3)), "must be"),
        (np.zeros((3, 1, 201), np.uint8), "201 x 1 px is too thin"),
        (Image.new("RGB", (10, 10_000)), "10 x 10,000 px is too thin"),
        ([], "there are none"),
        ([[], []], "there are none"),
        ("nowhere/photo.jpg", "nowhere/photo.jpg"),
        ("http://127.0.0.1:9/photo.jpg", "Cannot fetch.*127.0.0.1"),
        (base64.b64encode(b"no image").decode(), "Cannot read"),
    ],
)
def test_what_is_no_image_is_refused_by_name(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor(image)


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.rand(3, SIDE, SIDE), r"\(3, 32, 32\)"),
        (np.zeros((1, 3, SIDE, SIDE)), "got ndarray"),
        (VQRAEDecoderOutput(), "got VQRAEDecoderOutput: pass decode.*decoded_pixel_values"),
    ],
)
def test_what_are_no_pixels_of_a_model_is_refused_by_name(processor, bad, message):
    with pytest.raises(ValueError, match=message):
        processor.postprocess(bad)


def test_a_file_too_thin_to_be_resized_is_named_and_a_panorama_is_no_such(processor, tmp_path):
    """Resized to 224 px, 10,000 x 1 px would be 1.5 GB, of which the crop keeps a ten-thousandth."""
    Image.new("L", (10_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match=r"line\.png: An image of 10,000 x 1 px is too thin.*Remove or replace it"):
        decode_image({"path": str(tmp_path / "line.png"), "bytes": None})
    strip = np.zeros((3, 1, 200), np.uint8)
    strip[..., 100:] = 255
    middle = pixels(processor, strip)[0, :, SIDE // 2]  # around the edge, one pixel of the strip as wide as the crop
    assert (np.diff(middle) >= 0).all() and (middle[:, 0] < 0.5).all() and (middle[:, -1] > 0.5).all()


@pytest.fixture
def address(tmp_path):
    """A server of the files in `tmp_path`."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(timeout=10)


def test_paths_urls_and_base64_are_opened(processor, picture, tmp_path, address):
    """transparent: transformers' own way to read a path loses the alpha."""
    clear = np.dstack([picture, np.zeros((SIDE, SIDE), np.uint8)])
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(clear).save(tmp_path / "clear.png")
    encoded = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    images = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        f"{address}/a.png",
        encoded,
        f"data:image/png;base64,{encoded}",
    ]
    result = pixels(processor, [*images, str(tmp_path / "clear.png")])
    for image in result[:-1]:
        np.testing.assert_allclose(image, picture.transpose(2, 0, 1) / 255, atol=1e-6)
    assert result[-1].min() == 1
    with pytest.raises(ValueError, match="404"):
        processor(f"{address}/none.png")


# Modes and depths -----------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 65535, SIDE * SIDE).round().astype(np.uint16).reshape(SIDE, SIDE)
RAMP_8 = np.round(RAMP / 65535 * 255)


def grey_of(image):
    result = levels(image)
    assert (result == result[..., :1]).all()
    return result[..., 0]


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.fromarray(RAMP), RAMP_8),
        (Image.frombytes("I;16B", (SIDE, SIDE), RAMP.astype(">u2").tobytes()), RAMP_8),
        (Image.fromarray(RAMP.astype(np.int32)), RAMP_8),
        (Image.fromarray(RAMP_8.astype(np.int32)), RAMP_8),
        (Image.fromarray(RAMP.astype(np.float32)), RAMP_8),
        (Image.fromarray(RAMP_8.astype(np.float32)), RAMP_8),
        (Image.fromarray(RAMP.astype(np.float32) / 65535), RAMP_8),
        (Image.fromarray(RAMP_8.astype(np.uint8)), RAMP_8),
        (Image.fromarray(RAMP > 30000), np.where(RAMP > 30000, 255, 0)),
        (RAMP > 30000, np.where(RAMP > 30000, 255, 0)),
        (torch.from_numpy(RAMP > 30000), np.where(RAMP > 30000, 255, 0)),
    ],
    ids=["I;16", "I;16B", "I of 16", "I of 8", "F of 16", "F of 8", "F in 0-1", "L", "1", "bool", "torch.bool"],
)
def test_grey_of_any_depth_is_scaled_to_8_bits(processor, image, expected):
    np.testing.assert_array_equal(grey_of(image), expected)
    np.testing.assert_allclose(pixels(processor, image)[0, 1], expected / 255, atol=1e-6)


@pytest.mark.parametrize(
    "name, image",
    [
        ("a.png", Image.fromarray(RAMP)),
        ("a.tif", Image.fromarray(RAMP)),
        ("b.tif", Image.frombytes("I;16B", (SIDE, SIDE), RAMP.astype(">u2").tobytes())),
        ("c.tif", Image.fromarray(RAMP.astype(np.int32))),
        ("d.tif", Image.fromarray(RAMP.astype(np.float32) / 65535)),
        ("a.pgm", Image.fromarray(RAMP.astype(np.int32))),
        ("a.pfm", Image.fromarray(RAMP.astype(np.float32) / 65535)),
        ("a.jp2", Image.fromarray(RAMP)),
    ],
)
def test_files_of_16_bit_grey_are_no_white_images(name, image):
    np.testing.assert_array_equal(grey_of(saved(image, name)), RAMP_8)


def on_white(color, alpha):
    alpha = np.asarray(alpha, np.float64)[..., None] / 255
    return np.asarray(color, np.float64) * alpha + 255 * (1 - alpha)


def with_alpha(picture):
    color, alpha = Image.fromarray(picture), Image.fromarray(np.ascontiguousarray(picture[::-1, :, 0]))
    color.putalpha(alpha)
    return color, np.asarray(alpha)


def test_modes_with_alpha_are_composited_on_white(picture):
    image, alpha = with_alpha(picture)
    grey = np.repeat(np.asarray(Image.fromarray(picture).convert("L"))[..., None], 3, axis=2)
    grey_alpha = Image.fromarray(np.dstack([grey[..., 0], alpha]))
    assert grey_alpha.mode == "LA"
    np.testing.assert_allclose(levels(image), on_white(picture, alpha), atol=1)
    np.testing.assert_allclose(levels(grey_alpha), on_white(grey, alpha), atol=1)
    np.testing.assert_allclose(levels(saved(image)), on_white(picture, alpha), atol=1)
    # multiplied by alpha, in 8 bits
    np.testing.assert_allclose(levels(image.convert("RGBa")), on_white(picture, alpha), atol=2)
    np.testing.assert_allclose(levels(grey_alpha.convert("La")), on_white(grey, alpha), atol=2)
    palette = Image.fromarray(picture).convert("P", palette=Image.Palette.ADAPTIVE)
    colors = np.asarray(palette.convert("RGB"))
    palette_alpha = palette.copy()
    palette_alpha.putalpha(Image.fromarray(alpha))
    assert palette_alpha.mode == "PA"
    np.testing.assert_allclose(levels(palette_alpha), on_white(colors, alpha), atol=1)


def test_a_transparent_colour_is_white(picture):
    palette = Image.fromarray(picture).convert("P", palette=Image.Palette.ADAPTIVE)
    colors, index = np.asarray(palette.convert("RGB")), np.asarray(palette)
    for image in (palette, saved(palette, transparency=7)):
        expected = colors.copy()
        if image is palette:
            palette.info["transparency"] = 7
        expected[index == 7] = 255
        np.testing.assert_array_equal(levels(image), expected)
    several = bytes([0, 128] + [255] * 254)  # an alpha for each colour
    np.testing.assert_allclose(
        levels(saved(palette, transparency=several)), on_white(colors, np.frombuffer(several, np.uint8)[index]), atol=1
    )
    grey = np.ascontiguousarray(picture[..., 0])
    expected = np.where(grey == 9, 255, grey)
    np.testing.assert_array_equal(grey_of(saved(Image.fromarray(grey), transparency=9)), expected)
    one = tuple(picture[3, 4].tolist())
    expected = np.where((picture == one).all(-1, keepdims=True), 255, picture)
    np.testing.assert_array_equal(levels(saved(Image.fromarray(picture), transparency=one)), expected)
    level = int(RAMP[5, 5])
    expected = np.where(RAMP == level, 255, RAMP_8)
    np.testing.assert_array_equal(grey_of(saved(Image.fromarray(RAMP), transparency=level)), expected)


def test_other_colour_spaces_become_rgb(picture):
    c, m, y, k = (np.asarray(band, np.float64) / 255 for band in Image.fromarray(picture).convert("CMYK").split())
    k = k + 0.2
    cmyk = np.round(np.dstack([c, m, y, k]).clip(0, 1) * 255).astype(np.uint8)
    expected = (255 - cmyk[..., :3].astype(float)) * (255 - cmyk[..., 3:].astype(float)) / 255
    np.testing.assert_allclose(levels(Image.fromarray(cmyk, mode="CMYK")), expected, atol=1)
    for mode, tolerance in (("YCbCr", 3), ("HSV", 8), ("RGBX", 0)):
        np.testing.assert_allclose(levels(Image.fromarray(picture).convert(mode)), picture, atol=tolerance)
    assert levels(Image.new("LAB", (4, 4), (255, 128, 128))).shape == (4, 4, 3)


def test_a_colour_profile_is_left_alone(picture):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    np.testing.assert_array_equal(levels(saved(Image.fromarray(picture), icc_profile=profile)), picture)


def test_broken_exif_is_no_broken_image(picture):
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\xff\xff\xff\xff"
    np.testing.assert_array_equal(levels(saved(Image.fromarray(picture), exif=exif)), picture)


def test_exif_turns_an_image_once_wherever_it_comes_in(processor, tmp_path):
    image = np.zeros((20, 30, 3), np.uint8)
    image[:, :10] = 255  # at the left: at the top, once it is turned
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    record = {"path": str(tmp_path / "a.png"), "bytes": None}
    expected = np.rot90(image, -1)
    opened = Image.open(tmp_path / "a.png")
    for result in (opened, decode_image(record), to_rgb(decode_image(record))):
        np.testing.assert_array_equal(levels(result), expected)
    options = {"do_resize": False, "do_center_crop": False}
    for form in (opened, str(tmp_path / "a.png"), decode_image(record)):
        np.testing.assert_allclose(pixels(processor, form, **options)[0].transpose(1, 2, 0), expected / 255, atol=1e-6)
    # a protocol may say otherwise, and nobody turns it afterwards
    left = decode_image(record, turned_by_exif=False)
    np.testing.assert_array_equal(levels(left), image)
    assert Protocol.load("default").crop(opened, None).shape == (30, 20, 3)
    assert Protocol.load("rae-256").crop(opened, None).shape == (20, 30, 3)


def test_alpha_is_dropped_where_a_protocol_says_so(picture):
    image, _ = with_alpha(picture)
    np.testing.assert_array_equal(np.asarray(to_rgb(image, transparency="dropped")), picture)
    np.testing.assert_array_equal(Protocol.load("rae-256").crop(image, None), picture)


def test_the_callers_image_is_left_as_it_was(picture):
    image = Image.fromarray(picture)
    image.info["note"] = "kept"
    to_rgb(image).putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(image), picture)
    assert image.info == {"note": "kept"}


def test_no_mode_of_pillow_is_forgotten(processor):
    for mode in (
        "1",
        "L",
        "P",
        "RGB",
        "RGBA",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "I",
        "F",
        "LA",
        "PA",
        "RGBX",
        "RGBa",
        "La",
    ):
        assert pixels(processor, Image.new(mode, (SIDE, SIDE))).shape == (1, 3, SIDE, SIDE), mode
    for mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        assert pixels(processor, Image.new(mode, (SIDE, SIDE))).shape == (1, 3, SIDE, SIDE), mode


# Files ----------------------------------------------------------------------------------------------------------------


def test_every_suffix_that_pillow_has_for_the_formats_is_seen_and_read(tmp_path, picture):
    suffixes = {".avif", ".jp2", ".j2k", ".jpe", ".jfif", ".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".ppm"}
    suffixes |= {".bmp", ".gif", ".pgm", ".pnm", ".apng", ".ico"}
    assert suffixes <= EXTENSIONS and not {".eps", ".ps", ".wmf", ".psd", ".txt", ".mpg"} & EXTENSIONS
    formats = Image.registered_extensions()
    writable = sorted(suffix for suffix in EXTENSIONS if formats[suffix] in Image.SAVE)
    for suffix in writable:
        mode = {".pbm": "1", ".pgm": "L", ".pfm": "F"}.get(suffix, "RGB")
        file = tmp_path / f"image{suffix.upper() if suffix == '.jpe' else suffix}"
        Image.fromarray(picture).convert(mode).save(file, format=formats[suffix])
    files = find_images(tmp_path)
    assert len(files) == len(writable)
    for file in files:
        assert decode_image({"path": str(file), "bytes": None}).size == (SIDE, SIDE), file


def test_photographs_of_iphones_are_read_where_pillow_can(tmp_path, picture):
    pytest.importorskip("pillow_heif")
    Image.fromarray(picture).save(tmp_path / "a.heic", format="HEIF")
    (file,) = find_images(tmp_path)
    assert decode_image({"path": str(file), "bytes": None}).size == (SIDE, SIDE)


def test_formats_that_start_other_programs_are_opened_nowhere(processor, tmp_path, picture):
    assert not {"EPS", "WMF"} & FORMATS
    Image.fromarray(picture).save(tmp_path / "script.eps")
    (tmp_path / "script.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png"):
        processor(str(tmp_path / "a.png"))


def test_what_is_left_out_of_a_folder_is_told_in_a_line(image_folder, capsys):
    assert len(find_images(image_folder)) == 12
    assert capsys.readouterr().out == ""
    (image_folder / "b").mkdir()
    for name in ("b/labels.json", "b/more.JSON", "notes", ".DS_Store"):
        (image_folder / name).write_text("x")
    (image_folder / "._a-0.png").write_text("the Finder's")
    (image_folder / ".thumbnails").mkdir()
    shutil.copy(image_folder / "a-0.png", image_folder / ".thumbnails")
    assert len(find_images(image_folder)) == 12
    (line,) = capsys.readouterr().out.splitlines()
    assert "3 files" in line and "2 .json" in line and "b/labels.json" in line


def test_paths_of_fsspec_are_opened(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "c1/a.png")
    path = f"zip://c1/a.png::{tmp_path / 'x.zip'}"
    np.testing.assert_array_equal(np.asarray(decode_image({"path": path, "bytes": None})), picture)
    fsspec.filesystem("memory").pipe("/c1/a.png", (tmp_path / "a.png").read_bytes())
    for path in (f"file://{tmp_path / 'a.png'}", "memory://c1/a.png"):
        np.testing.assert_array_equal(np.asarray(decode_image({"path": path, "bytes": None})), picture)
    for path in (f"zip://none.png::{tmp_path / 'x.zip'}", "zip://a.png::/nowhere.zip", "nosuch://a.png"):
        with pytest.raises(ValueError, match=path.split("::")[0]):
            decode_image({"path": path, "bytes": None})


@pytest.mark.parametrize("record", [None, {"path": None, "bytes": None}])
def test_a_record_without_an_image_is_told(record):
    with pytest.raises(ValueError, match="neither bytes nor a path"):
        decode_image(record)


def test_the_name_of_an_image_is_its_path_below_the_folder_wherever_that_is(tmp_path, image_folder, monkeypatch):
    (image_folder / "c1").mkdir()
    shutil.copy(image_folder / "a-0.png", image_folder / "c1")
    moved = shutil.copytree(image_folder, tmp_path / "elsewhere" / "copy")
    names = [[image_name(r["image"]) for r in load_images(str(folder))] for folder in (image_folder, moved)]
    monkeypatch.chdir(moved)
    names += [[image_name(r["image"]) for r in load_images(name)] for name in (".", "../copy/")]
    assert all(one == names[0] for one in names) and {"a-0.png", "c1/a-0.png"} < set(names[0])
    (listed,) = dataset_of_files([Path("c1/a-0.png")])
    assert image_name(listed["image"]) == "c1/a-0.png"
    # of the hub
    assert image_name({"path": "hf://datasets/x/c1/0001.jpg", "bytes": None}) == "hf://datasets/x/c1/0001.jpg"
    assert image_name({"path": "0001.jpg", "bytes": b"one"}) != image_name({"path": "0001.jpg", "bytes": b"other"})
    assert image_name({"path": None, "bytes": b"one"})
