#!/usr/bin/env python
"""The first minutes with a tokenizer: images to tokens and back, a short fine-tuning, and what it changed.

    python -m examples.quickstart

Loads checkpoints/vqrae-dinov2-small, reconstructs images that it has not seen, fine-tunes its decoder on emoji,
measures it before and after on others that are held out, makes new images by checkpoints/emoji-llama, and writes
runs/quickstart/quickstart.html. It needs no network, and takes a few minutes on two CPU cores. Every step is a command
of this repository, and is printed. An interrupted quick start goes on where it was when it is given again.
"""

import html
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from eval.commands import CommandParser, ends_in_one_line
from eval.files import write_whole
from eval.pictures import as_html, rows_of
from eval.results import title
from eval.token_maps import token_map
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from reading.files import dataset_of_files
from reading.images import decode_image


ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT, OUTPUT, HELDOUT = "checkpoints/vqrae-dinov2-small", "runs/quickstart", "examples/heldout.txt"
GENERATOR = "checkpoints/emoji-llama"
DRAWING = ("--guidance_scale", "2.5", "--temperature", "0.92")  # as its card recommends
# four photographs, and four emoji of HELDOUT; none of them was in the training of the checkpoint
SHOWN = ("astronaut.jpg", "chelsea.jpg", "coffee.jpg", "rocket.jpg")
SHOWN += ("emoji-0023-fe0f-20e3.webp", "emoji-1f4a7.webp", "emoji-1f516.webp", "emoji-1f951.webp")
ROWS = (
    "From above: originals; tokens, near codes in near colours; reconstructions; the same after fine-tuning on emoji; "
    "new images by a language model of tokens."
)
NEXT = f"""What to try next:
  python app.py                                            the same in the browser: needs pip install ".[demo]"
  python train_hf.py configs/quickstart.json --train_data MY_IMAGES --eval_data MY_OTHERS --output_dir runs/mine
  python -m eval.reconstruction --model_name_or_path {CHECKPOINT} --data MY_IMAGES --output_dir results
  python -m generation.sample --model_name_or_path {GENERATOR} --classes Flags \\
      {" ".join(DRAWING)} --output_dir runs/flags
README.md, "Train on your images", shows how to train a tokenizer on another encoder."""


def run(*command: str) -> None:
    """One command of the repository, shown as it is typed."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise RuntimeError("the command above did not end well; given again, the quick start goes on from there.")


def measure(model: str, name: str) -> dict[str, float]:
    """Metrics of a model on the held-out emoji, without those that need the weights of other networks."""
    output = f"{OUTPUT}/{name}"
    run(
        *("-m", "eval.reconstruction"),
        *("--model_name_or_path", model, "--data", HELDOUT, "--image_size", "112"),
        *("--protocol", "examples/quickstart_protocol.json", "--network_metrics", "--output_dir", output),
    )
    return json.loads((ROOT / output / "results.json").read_text())["metrics"]


@torch.no_grad()
def reconstruct(name: str, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, VQRAEModel]:
    """Tokens (B, h, w) and reconstructions of pixels, and the model that made them."""
    model = VQRAEModel.from_pretrained(ROOT / name, dtype=torch.float32).eval()
    tokens = model.encode(pixels).image_tokens
    return tokens, model.decode(tokens).decoded_pixel_values, model


def new_images(count: int, size: torch.Size) -> torch.Tensor:
    """Images that nobody has drawn, enlarged to `size`: (count, 3, height, width) in [0, 1]."""
    output = f"{OUTPUT}/new_images"
    shutil.rmtree(ROOT / output, ignore_errors=True)  # of an earlier version's generator, which would be refused
    run(
        *("-m", "generation.sample"),
        *("--model_name_or_path", GENERATOR, "--num_images", str(count), *DRAWING),
        *("--output_dir", output),
    )
    made = torch.stack([pil_to_tensor(Image.open(ROOT / output / f"{i:06d}.png")) for i in range(count)]) / 255
    return F.interpolate(made, size)


def main() -> None:
    emoji = (ROOT / HELDOUT).read_text().split()
    files = [ROOT / "examples" / "images" / name for name in SHOWN]
    processor = VQRAEImageProcessor.from_pretrained(ROOT / CHECKPOINT)
    images = [decode_image(record) for record in dataset_of_files(files)["image"]]
    pixels = processor(images, return_tensors="pt").pixel_values
    print(f"Reconstructing {len(files)} images with {CHECKPOINT}.", flush=True)
    tokens, before, model = reconstruct(CHECKPOINT, pixels)
    print(f"{tuple(pixels.shape)} pixels -> {tuple(tokens.shape)} tokens, {len(tokens.unique()):,} different codes.")
    maps = torch.stack([pil_to_tensor(token_map(model, image_tokens)) for image_tokens in tokens]) / 255

    measured = {"before": measure(CHECKPOINT, "before")}
    run("train_hf.py", "configs/quickstart.json")
    measured["after"] = measure(OUTPUT, "after")
    after = reconstruct(OUTPUT, pixels)[1]
    new = new_images(len(files), pixels.shape[2:])

    names = [name for name, value in measured["before"].items() if value is not None]
    table = [[title(name), *(f"{measured[when][name]:.4g}" for when in measured)] for name in names]
    picture, page = ROOT / OUTPUT / "quickstart.png", ROOT / OUTPUT / "quickstart.html"
    grid = rows_of([pixels, maps, before, after, new], columns=len(files))
    write_whole(picture, lambda path: grid.save(path, format="PNG"))
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table)
    text = (
        '<!doctype html><meta charset="utf-8"><title>Quick start</title><style>body{font-family:sans-serif;margin:2em}'
        "img{max-width:100%}td,th{padding:0 1em 0 0;text-align:left}pre{white-space:pre-wrap}</style>"
        f"<h1>Quick start</h1><p>{ROWS}</p>{as_html(grid)}<h2>{len(emoji)} held-out emoji of 112 px</h2>"
        f"<table><tr><th></th><th>before</th><th>after fine-tuning</th></tr>{rows}</table>"
        f"<pre>{html.escape(NEXT)}</pre>"
    )
    write_whole(page, lambda path: path.write_text(text))

    print(f"\n{len(emoji)} held-out emoji of 112 px:")
    for cells in [["", "before", "after"], *table]:
        print("{:>30} {:>12} {:>12}".format(*cells))
    print(f"\nPictures: {page}\n(the same as an image: {picture})\n\n{NEXT}")


if __name__ == "__main__":
    CommandParser(__doc__).parse_args()  # for --help: it has no options
    with ends_in_one_line():
        main()
