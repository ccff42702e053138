#!/usr/bin/env python
"""Halves the files of a trained tokenizer: all in float16 but the layer of SimVQ that moves the codes.

    python -m convert.float16 --model_name_or_path runs/stage2 --data my_images --output_dir checkpoints/my-tokenizer

Weights are stored in float16 and loaded as float32 (`dtype` of config.json), so that only they are rounded, not what is
computed with them; float16 has three more bits for them than bfloat16. W and b of SimVQ are few and stay as they are; a
codebook that is trained itself (`use_simvq` off) does so too. With --data the rounded model is compared with
its source: tokens that differ, and pixels. Card, image processor, recipe, report and the latest picture go along, and
today's code; its encoder is frozen for those who train it further without --stage 2. Results of evaluations do not, and
what training measured is said to be of the weights before: `eval/reconstruction.py --update_model_card` measures the
new file.
"""

import argparse
import math
import shutil
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers.dynamic_module_utils import custom_object_save

from eval.commands import CommandParser, ends_in_one_line
from eval.files import write_folder_whole
from eval.psnr.psnr import psnr_per_image
from modeling_simvq import ImageTokenizer
from quantization_simvq import SimVQ
from reading.images import decode_image
from reading.models import load_pretrained, load_processor
from reading.sources import load_images
from reading.wording import counted


COPIED = ("training_recipe.json", "training_report.html")
WEIGHTS = "`model.safetensors` holds {of}, rounded to float16 and loaded as float32, but for {kept}, in float32."


def halve(source: Path, target: Path, use_simvq: bool) -> None:
    """Writes a folder's model.safetensors anew.

    Args:
        source, target: files.
        use_simvq: the codebook is frozen behind a linear layer, and its own values may be rounded.

    Raises:
        ValueError: weights that float16 cannot hold.
    """
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    for name, tensor in tensors.items():
        kept = name.startswith("quantizer.embedding_proj." if use_simvq else "quantizer.")
        if tensor.is_floating_point() and not kept:
            tensors[name] = tensor.half()
            if not tensors[name].isfinite().all():
                raise ValueError(f"{name} has values beyond those of float16, up to {tensor.abs().max():.3g}.")
    save_file(tensors, target, metadata=metadata)


def renamed(card: str, before: str, after: str) -> str:
    """The text of a model card with another name of the model in its title and its code."""
    card = card.replace(f"# {before}\n", f"# {after}\n")
    return card.replace(f'from_pretrained("{before}"', f'from_pretrained("{after}"')


def check_folders(parser: CommandParser, args: argparse.Namespace) -> None:
    """Ends the command where `model_name_or_path` is no folder of a model, or `output_dir` is there already."""
    if not (args.model_name_or_path / "model.safetensors").is_file():
        parser.error(f"--model_name_or_path: {args.model_name_or_path} has no model.safetensors")
    if args.output_dir.exists():
        parser.error(f"--output_dir {args.output_dir} exists: remove it or choose another")


def convert(source: Path, output: Path) -> None:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        for name in COPIED:
            if (source / name).exists():
                shutil.copy(source / name, folder)
        model = load_pretrained(str(source), {})
        load_processor(str(source), model.config.image_size).save_pretrained(folder)
        custom_object_save(model, folder, config=model.config)
        model.config.dtype = "float32"
        model.config.freeze_encoder = True  # whoever fine-tunes it does not train the encoder unawares
        model.config.save_pretrained(folder)
        use_simvq = isinstance(model.quantizer, SimVQ)
        halve(source / "model.safetensors", folder / "model.safetensors", use_simvq)
        card_file = source / "README.md"
        if not card_file.exists():
            return
        card = ModelCard.load(card_file)
        card.data.eval_results = None
        before, heading, rest = card.text.partition("\n## Weights\n")
        if heading:
            averaged = "the moving average of the weights" if "moving average" in rest.partition("\n## ")[0] else ""
            rest = rest[rest.index("\n## ") :]
            kept = "W and b of the quantizer" if use_simvq else "the quantizer"
            weights = WEIGHTS.format(of=averaged or "the trained weights", kept=kept)
            card.text = f"{before}{heading}\n{weights}\n{rest}"
        card.text = card.text.replace("\nHeld-out images after step", "\nBefore rounding, held-out images after step")
        card.text = renamed(card.text, source.name, output.name)
        (folder / "README.md").write_text(str(card))
        pictures = sorted((source / "reconstructions").glob("*.png"))[-1:]
        for picture in pictures:
            (folder / "reconstructions").mkdir()
            shutil.copy(picture, folder / "reconstructions")

    write_folder_whole(output, write)


@torch.no_grad()
def compare(source: ImageTokenizer, rounded: ImageTokenizer, data: str, max_images: int = 64) -> str:
    """How far the rounded model is from its source on images, in words. Of more than `max_images`, evenly spread ones
    are taken."""
    processor = load_processor(source.name_or_path, source.config.image_size)
    images = load_images(data)
    images = images.select(range(0, len(images), math.ceil(len(images) / max_images)))
    same, scores = [], []
    for record in tqdm(images["image"], desc="Comparing", unit="image"):
        pixels = processor(decode_image(record), return_tensors="pt").pixel_values
        ours, theirs = (model(pixels, return_loss=False) for model in (source, rounded))
        same.append((ours.image_tokens == theirs.image_tokens).float().mean())
        scores.append([psnr_per_image(o.decoded_pixel_values.clamp(0, 1), pixels) for o in (ours, theirs)])
    before, after = torch.tensor(scores).mean(0)
    return (
        f"{counted(len(images), 'image')}: {torch.stack(same).mean():.3%} of the tokens are the same; PSNR "
        f"{before:.4f} dB before, {after:.4f} dB after rounding."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, type=Path, help="Folder of a trained tokenizer.")
    parser.add_argument("--data", help="Images to compare on (64 at most), see docs/data.md.")
    parser.add_argument("--output_dir", required=True, type=Path, help="A new folder.")
    args = parser.parse_args(arguments)
    check_folders(parser, args)
    if args.data:
        load_images(args.data)  # that there are some, before anything is written
    transformers.logging.set_verbosity_error()
    convert(args.model_name_or_path, args.output_dir)
    before, after = (
        (folder / "model.safetensors").stat().st_size / 1e6 for folder in (args.model_name_or_path, args.output_dir)
    )
    print(f"{args.output_dir}: {after:.1f} MB, {before:.1f} MB before.")
    if args.data:
        models = (load_pretrained(str(folder), {}).eval() for folder in (args.model_name_or_path, args.output_dir))
        print(compare(*models, args.data))


if __name__ == "__main__":
    with ends_in_one_line():
        main()
