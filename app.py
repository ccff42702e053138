#!/usr/bin/env python
"""A page on which to try an image tokenizer: reconstructions, its codebook, tokens replaced by hand; and new images,
where there is a generator.

    python app.py
    python app.py --model runs/quickstart
    python app.py --model runs/tokenizer --generator runs/generator

`python -m examples.space` makes a Hugging Face Space of it. No code that comes with a model is run, and the page loads
nothing from elsewhere.
"""

import functools
import os
from pathlib import Path

import torch
from PIL import Image, ImageDraw


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from eval.codebook_usage.codebook_usage import codebook_statistics, count_codes
from eval.commands import CommandParser, ends_in_one_line
from eval.metrics import to_uint8
from eval.psnr.psnr import psnr_per_image
from eval.results import code_chart
from eval.token_maps import check_code, code_colors, code_pixels, neighbours, replace_tokens, token_map
from generation.demo import Generator
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import ImageTokenizer
from reading.files import find_images
from reading.images import decode_image
from reading.models import load_pretrained, load_processor


ROOT = Path(__file__).parent
BOX = ROOT / "checkpoints" / "vqrae-dinov2-small"
# a Space may have another one in its place
DEFAULT_MODEL = BOX if BOX.is_dir() else next((x.parent for x in BOX.parent.glob("*/preprocessor_config.json")), BOX)
DEFAULT_GENERATOR = ROOT / "checkpoints" / "emoji-llama"
EXAMPLES = ROOT / "examples" / "images"
# to choose from; for the usage of the codebook, all of the folder are counted
SHOWN = ("astronaut.jpg", "chelsea.jpg", "coffee.jpg", "rocket.jpg", "emoji-1f304.webp", "emoji-1f42f.webp")
SHOWN += ("emoji-1f34c.webp", "emoji-1f60e.webp")
MAX_ASPECT_RATIO = 8  # the shorter side is resized to the model's size; a line would become a picture of gigabytes
MAP_SIDE = 512  # pixels, more than the page has for a map
SESSION, ALL_EXAMPLES = "images of this session", "all example images"
CSS = """
.pixels .image-container, .pixels .grid-wrap { padding-top: 30px; }  /* below the label, not under it */
.pixels img { width: 100%; height: 100%; object-fit: contain; }
.tokens img { image-rendering: pixelated; cursor: crosshair; }
@media (max-width: 600px) { .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
"""


def read_pixels(path: str | None, processor: VQRAEImageProcessor) -> torch.Tensor:
    """An image file -> (1, 3, H, W) in [0, 1], as the model takes it.

    Raises:
        ValueError: no file, one that cannot be read, or too long an image.
    """
    if path is None:
        raise ValueError("There is no image: upload one, or click an example.")
    try:
        image = decode_image({"path": path, "bytes": None})
    except ValueError as error:
        raise ValueError(
            f"{Path(path).name} cannot be read: it is damaged, no image, or too thin. Upload a PNG, JPEG or WebP file."
        ) from error
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(
            f"{Path(path).name} is {image.width} x {image.height} px: crop it so that no side is more than "
            f"{MAX_ASPECT_RATIO} times the other."
        )
    return processor(image, return_tensors="pt").pixel_values


def outlined(picture: Image.Image, rectangle: tuple[int, int, int, int], square: int) -> Image.Image:
    """A copy of a token map with a frame around a rectangle.

    Args:
        picture: with squares of `square` pixels.
        rectangle: top, left, height and width in tokens.
        square: at least 8.
    """
    top, left, height, width = (square * side for side in rectangle)
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    for inset, color in ((0, "black"), (2, "white")):
        box = left + inset, top + inset, left + width - 1 - inset, top + height - 1 - inset
        draw.rectangle(box, outline=color, width=2)
    return picture


def clicked_rectangle(rectangle: tuple[int, int, int, int], row: int, column: int) -> tuple[int, int, int, int]:
    """What a click on a token makes of a rectangle: one token becomes the corner opposite to the one clicked; any other
    rectangle gives way to the token clicked."""
    top, left, height, width = rectangle
    if (height, width) != (1, 1):
        return row, column, 1, 1
    return min(top, row), min(left, column), abs(row - top) + 1, abs(column - left) + 1


def told(function):
    """What is wrong with an input, as a message on the page."""

    @functools.wraps(function)
    def wrapped(*args):
        try:
            return function(*args)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return wrapped


class Tokenizer:
    """A model with its processor, in the steps of the page.

    Args:
        model: in eval mode.
        processor: of its images.
        examples: files whose tokens are counted on request.
    """

    def __init__(self, model: ImageTokenizer, processor: VQRAEImageProcessor, examples: list[str]) -> None:
        self.model, self.processor, self.examples = model, processor, examples
        self.colors = code_colors(model)
        self.example_counts = None
        # The page shows maps smaller than they are: of larger pictures, Gradio misplaces clicks.
        self.square = max(8, -(-MAP_SIDE // model.config.grid_size))

    @torch.no_grad()
    def encode(self, path: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A file -> its pixels (1, 3, H, W) on the CPU and its tokens (h, w)."""
        pixels = read_pixels(path, self.processor)
        return pixels, self.model.get_image_tokens(pixels.to(self.model.device))[0].cpu()

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """(h, w) -> pixels (1, 3, H, W) on the CPU."""
        return self.model.decode_image_tokens(tokens[None].to(self.model.device)).cpu()

    def reconstruct(self, path: str | None, counts: torch.Tensor) -> tuple:
        """What the page shows of a file: see the outputs in `build`."""
        pixels, tokens = self.encode(path)
        fake = self.decode(tokens)
        error = (4 * (pixels - fake.clamp(0, 1)).abs().mean(1, keepdim=True)).expand_as(pixels)
        original, picture, error = (self.processor.postprocess(x)[0] for x in (pixels, fake, error))
        psnr = psnr_per_image(to_uint8(fake) / 255, to_uint8(pixels) / 255).item()
        text = (
            f"PSNR **{psnr:.2f} dB** · **{len(tokens.unique())}** distinct codes among {tokens.numel()} tokens, "
            f"{tokens.shape[0]} x {tokens.shape[1]}"
        )
        shown = original, picture, error, self._map(tokens), text
        return *shown, tokens, picture, tokens, picture, counts + count_codes(tokens, len(counts))

    def usage(self, over: str, counts: torch.Tensor, progress=gr.Progress()) -> tuple[str, str]:  # noqa: B008
        """Text and chart of the use of the codes: by the session's counts, or by all examples."""
        if over == ALL_EXAMPLES:
            counts = self._count_examples(progress)
        if not counts.any():
            return "No image yet: open one in the first tab.", ""
        statistics = codebook_statistics(counts)
        text = (
            f"**{counts.count_nonzero():,}** of {len(counts):,} codes used "
            f"(**{statistics['codebook_utilization']:.1%}**), perplexity **{statistics['codebook_perplexity']:.0f}**, "
            f"over {statistics['codebook_tokens']:,} tokens"
        )
        # dark text and lines, whatever the theme
        return text, f'<div style="background: #fff; color: #222; overflow-x: auto">{code_chart(counts)}</div>'

    def _count_examples(self, progress: gr.Progress) -> torch.Tensor:
        """Counts of the codes over those examples that can be read; made once."""
        if self.example_counts is None:
            counts = torch.zeros(self.model.config.codebook_size, dtype=torch.int64)
            for path in progress.tqdm(self.examples, desc="Encoding", unit="images"):
                try:
                    counts += count_codes(self.encode(path)[1], len(counts))
                except ValueError as error:
                    print(f"Left out: {error}")
            self.example_counts = counts
        return self.example_counts

    def look_at(self, code: int | None, tokens: torch.Tensor | None, shown: int | None = None) -> tuple:
        """A code decoded alone, text about it, its neighbours with captions, and the code. The pictures of a code that
        is `shown` already are left as they are: Gradio writes equal pictures into the same file, and a browser that is
        just reading it would show none."""
        code = self._entered(code)
        text = f"Code **{code}**"
        if tokens is not None:
            text += f": {(tokens == code).sum()} of the {tokens.numel()} tokens of the image in the first tab"
        if code == shown:
            return gr.skip(), text, gr.skip(), code
        near, distances = neighbours(self.model, code)
        own, *others = self.processor.postprocess(code_pixels(self.model, near))
        captions = [f"{i} at {d:.2f}" for i, d in zip(near[1:].tolist(), distances[1:].tolist())]
        return own, text, list(zip(others, captions)), code

    def neighbour(self, code: int | None, chosen: gr.SelectData) -> int:
        """The neighbour that was clicked."""
        return neighbours(self.model, self._entered(code))[0][chosen.index + 1].item()

    def clicked_code(self, tokens: torch.Tensor, chosen: gr.SelectData) -> tuple:
        """The code that was clicked on the token map, and the tab that shows it."""
        return tokens[self._place(chosen)].item(), gr.Tabs(selected="codebook")

    def clicked_corner(self, top: int, left: int, height: int, width: int, chosen: gr.SelectData) -> tuple:
        return clicked_rectangle((top, left, height, width), *self._place(chosen))

    def framed(self, edited: torch.Tensor | None, *rectangle: int) -> Image.Image | None:
        """The map of the edited tokens with the rectangle."""
        if edited is None:
            return None
        return outlined(self._map(edited), rectangle, self.square)

    def fill(self, edited: torch.Tensor | None, code: int | None, *rectangle: int) -> tuple:
        """Edited tokens with a code in the rectangle, and their picture."""
        check_code(self.model, self._entered(code))
        return self._replace(edited, rectangle, code)

    def transplant(self, edited: torch.Tensor | None, path: str | None, *rectangle: int) -> tuple:
        """Edited tokens with those of another image in the rectangle, and their picture."""
        return self._replace(edited, rectangle, self.encode(path)[1])

    def _replace(self, edited: torch.Tensor | None, rectangle: tuple, by: int | torch.Tensor) -> tuple:
        if edited is None:
            raise ValueError("There are no tokens to replace: open an image in the first tab.")
        edited = replace_tokens(edited, rectangle, by)
        return edited, self.processor.postprocess(self.decode(edited))[0]

    def _entered(self, code: int | None) -> int:
        if code is None:
            raise ValueError(f"Enter the number of a code, from 0 to {self.model.config.codebook_size - 1}.")
        return code

    def _place(self, chosen: gr.SelectData) -> tuple[int, int]:
        """Row and column of the token that was clicked."""
        x, y = chosen.index
        return y // self.square, x // self.square

    def _map(self, tokens: torch.Tensor) -> Image.Image:
        """The token map with squares of `square` pixels."""
        rows, columns = tokens.shape
        size = columns * self.square, rows * self.square
        return token_map(self.model, tokens, self.colors).resize(size, Image.Resampling.NEAREST)


def build_tabs(generator: Generator, upload, shown: list[str]) -> None:
    """The tabs of new images.

    Args:
        upload: makes a field for an image, see `build`.
        shown: files of examples.
    """

    def options(guidance: float, chosen: int) -> list:
        """`chosen`: the place of the class that is shown first."""
        if generator.vocabulary.condition == "text":
            condition = gr.Textbox(label="Text")
        else:
            condition = gr.Dropdown(generator.choices, value=generator.choices[chosen], label="Class")
        return [
            condition,
            gr.Number(0, label="Seed of the first image", precision=0),
            gr.Slider(1, 8, 4, step=1, label="Images"),
            gr.Slider(0.0, 5.0, guidance, step=0.1, label="Guidance, 1 is none"),
            gr.Slider(0.0, 2.0, 0.9, step=0.05, label="Temperature"),
        ]

    def gallery(name: str) -> gr.Gallery:
        return gr.Gallery(label="New images", columns=4, interactive=False, format="png", elem_id=name)

    def complete(path: str | None, *entered) -> list[Image.Image]:
        return generator.complete(read_pixels(path, generator.processor), *entered)

    with gr.Tab("Generate", id="generate"), gr.Row():
        with gr.Column(scale=2, min_width=260):
            entered = options(2.5 if generator.vocabulary.condition == "class" else 1.0, chosen=-1)
            draw = gr.Button("Generate", variant="primary", elem_id="generate")
        with gr.Column(scale=5):
            draw.click(told(generator.generate), entered, gallery("generated"))
    with gr.Tab("Complete", id="complete"), gr.Row():
        with gr.Column(scale=2, min_width=260):
            image = upload("Image, whose upper rows are kept", elem_id="complete-upload")
            rows = generator.vocabulary.height
            keep = gr.Slider(1, rows - 1, rows // 2, step=1, label=f"Rows of tokens to keep, of {rows}")
            entered = [image, keep, *options(1.0, chosen=0)]  # the image says what it is of
            draw = gr.Button("Complete", variant="primary", elem_id="complete")
            gr.Examples(shown, image, label="Examples")
        with gr.Column(scale=5):
            draw.click(told(complete), entered, gallery("completed"))


def build(tokenizer: Tokenizer, name: str, generator: Generator | None = None) -> gr.Blocks:
    """The page.

    Args:
        tokenizer: see [`Tokenizer`].
        name: of the model.
        generator: of new images; `None`: the page has no tabs for these.
    """
    config = tokenizer.model.config
    side, codes = config.grid_size, config.codebook_size
    shown = [str(EXAMPLES / file) for file in SHOWN]

    def picture(label: str, classes: tuple[str, ...] = (), **options) -> gr.Image:
        options = {"height": 350, "elem_classes": ["pixels", *classes]} | options
        return gr.Image(label=label, format="png", interactive=False, buttons=["download"], **options)

    def upload(label: str, **options) -> gr.Image:
        image = gr.Image(label=label, type="filepath", sources=["upload"], height=220, **options)
        image.preprocess = lambda payload: payload and payload.path  # read_pixels opens it, and tells what is wrong
        return image

    with gr.Blocks(title="Image tokenizer", analytics_enabled=False) as page:
        gr.Markdown(
            f"# Image tokenizer\n**{name}**: an image of {config.image_size} x {config.image_size} px becomes {side} x "
            f"{side} tokens from a codebook of {codes:,}, and these become an image again."
        )
        # of the visitor: tokens of the image, those edited, and how often each code was given
        tokens, edited, looked_at = gr.State(), gr.State(), gr.State()
        counts = gr.State(torch.zeros(codes, dtype=torch.int64))
        with gr.Tabs() as tabs:
            with gr.Tab("Reconstruct", id="reconstruct"), gr.Row():
                with gr.Column(scale=2, min_width=260):
                    image = upload("Image", value=shown[0], elem_id="upload")
                    examples = gr.Examples(shown, image, label="Examples")
                with gr.Column(scale=5):
                    text = gr.Markdown(elem_id="text")
                    with gr.Row():
                        original = picture("Original, as the model gets it")
                        reconstruction = picture("Reconstruction", elem_id="reconstruction")
                    with gr.Row():
                        error = picture("Absolute error x 4")
                        tokens_map = picture(
                            "Token map: near codes, near colours. Click one to see it", ("tokens",), elem_id="token-map"
                        )
            with gr.Tab("Codebook", id="codebook") as codebook_tab:
                with gr.Row():
                    with gr.Column(scale=1):
                        code = gr.Number(0, label=f"Code, 0 to {codes - 1}", precision=0, elem_id="code")
                        code_text = gr.Markdown(elem_id="code-text")
                        alone = picture("Decoded alone: a grid filled with it", height=330, elem_id="alone")
                    with gr.Column(scale=2):
                        near = gr.Gallery(
                            label="Nearest codes, and L2 distances. Click one",
                            columns=4,
                            height=460,
                            allow_preview=False,
                            interactive=False,
                            format="png",
                            elem_classes="pixels",
                            elem_id="near",
                        )
                with gr.Row():
                    with gr.Column(scale=1):
                        over = gr.Radio([SESSION, ALL_EXAMPLES], value=SESSION, label="Use of the codes over")
                        usage_text = gr.Markdown(elem_id="usage")
                    with gr.Column(scale=2):
                        chart = gr.HTML()
            with gr.Tab("Edit", id="edit"), gr.Row():
                with gr.Column(scale=2, min_width=260):
                    with gr.Group():
                        start, half = side // 4, max(1, side // 2)
                        with gr.Row():
                            top = gr.Slider(0, side - 1, start, step=1, label="Top", min_width=130, elem_id="top")
                            left = gr.Slider(0, side - 1, start, step=1, label="Left", min_width=130)
                        with gr.Row():
                            height = gr.Slider(1, side, half, step=1, label="Height", min_width=130)
                            width = gr.Slider(1, side, half, step=1, label="Width", min_width=130)
                        everywhere = gr.Button("Everywhere", size="sm")
                    with gr.Group():
                        new_code = gr.Number(0, label=f"Code, 0 to {codes - 1}", precision=0, elem_id="new-code")
                        fill = gr.Button("Fill the rectangle with it", variant="primary", size="sm", elem_id="fill")
                    start_over = gr.Button("Start over", size="sm")
                with gr.Column(scale=5):
                    with gr.Row():
                        before = picture("Before")
                        after = picture("After", elem_id="after")
                    with gr.Row():
                        edit_map = picture("Tokens: click two corners of a rectangle", ("tokens",), elem_id="edit-map")
                        with gr.Column():
                            with gr.Group():
                                other = upload("Another image", elem_id="other")
                                transplant = gr.Button(
                                    "Take its tokens there", variant="primary", size="sm", elem_id="transplant"
                                )
                            gr.Examples(shown, other, label="Examples")
            if generator:
                build_tabs(generator, upload, shown)

        outputs = [original, reconstruction, error, tokens_map, text, tokens, before, edited, after, counts]
        rectangle = [top, left, height, width]
        reconstruct = told(tokenizer.reconstruct), [image, counts], outputs
        framed = told(tokenizer.framed), [edited, *rectangle], edit_map
        usage = told(tokenizer.usage), [over, counts], [usage_text, chart]
        look_at = told(tokenizer.look_at), [code, tokens, looked_at], [alone, code_text, near, looked_at]
        quiet, latest = {"show_progress": "hidden"}, {"trigger_mode": "always_last"}

        gr.on([page.load, image.upload], *reconstruct, **latest)
        examples.load_input_event.success(*reconstruct, **latest)
        gr.on([edited.change, *(number.change for number in rectangle)], *framed, **quiet, **latest)
        tokens_map.select(told(tokenizer.clicked_code), tokens, [code, tabs], **quiet)

        gr.on([page.load, code.change, codebook_tab.select], *look_at, **latest)
        near.select(told(tokenizer.neighbour), code, code, **quiet)
        gr.on([codebook_tab.select, over.change], *usage, **latest)

        edit_map.select(told(tokenizer.clicked_corner), rectangle, rectangle, **quiet)
        everywhere.click(lambda: (0, 0, side, side), None, rectangle, **quiet)
        fill.click(told(tokenizer.fill), [edited, new_code, *rectangle], [edited, after])
        transplant.click(told(tokenizer.transplant), [edited, other, *rectangle], [edited, after])
        start_over.click(lambda *shown: shown, [tokens, before], [edited, after])
    return page


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--model", help=f"A tokenizer: folder or hub repository (default: {DEFAULT_MODEL.name}).")
    parser.add_argument(
        "--generator",
        help=f"Makes new images: folder or hub repository (default: {DEFAULT_GENERATOR.name}, if there is no --model).",
    )
    args = parser.parse_args()
    name, generator = args.model, args.generator
    if name is None and not DEFAULT_MODEL.is_dir():
        parser.error(f"{DEFAULT_MODEL} is not there: name a tokenizer with --model.")
    if generator is None and name is None and DEFAULT_GENERATOR.is_dir():
        generator = str(DEFAULT_GENERATOR)
    name = name or str(DEFAULT_MODEL)
    print(f"Loading {name}.", flush=True)
    model = load_pretrained(name, {}).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(name, model.config.image_size)
    examples = [str(path) for path in find_images(EXAMPLES)]
    generator = Generator.load(generator, model) if generator else None
    page = build(Tokenizer(model, processor, examples), Path(name).name, generator)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"])
    page.launch(theme=theme, css=CSS, footer_links=[], max_file_size="20mb", show_error=True)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
