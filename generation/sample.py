#!/usr/bin/env python
"""Makes new images by a generator of generation/train.py, or completes an image that is given.

    python -m generation.sample --model_name_or_path runs/generator --num_images 16 --output_dir runs/samples
    python -m generation.sample --model_name_or_path runs/generator --num_images 8 --classes dog cat --seed 7 \\
        --guidance_scale 2 --temperature 0.9 --output_dir runs/dogs_and_cats
    python -m generation.sample --model_name_or_path runs/generator --num_images 8 --complete cat.png --keep_rows 14 \\
        --output_dir runs/completed

Image i has the seed `--seed` + i and the i-th of the conditions, which are gone through again and again; with these it
is the same image whatever --num_images, --batch_size or the number of processes (`accelerate launch -m
generation.sample ...`). Writes one PNG for each image (000000.png, ...), grid.png with the first 64, and samples.json,
which says what made them. The same command again goes on where it was interrupted: images that are there stay.
"""

import json
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from eval.commands import CommandParser, ends_in_one_line
from eval.files import read_fields, write_whole
from eval.networks import weights_hash
from eval.options import present_device, whole_number
from eval.pictures import save_rows
from eval.results import library_versions
from generation.sampling import (
    check_options,
    first_rows,
    generate_images,
    grid_processor,
    load_generator,
    load_painter,
    load_text_encoder,
)
from generation.vocabulary import Vocabulary
from image_processing_simvq import VQRAEImageProcessor, read_image
from reading.wording import counted, one_of_processes
from training.hub import on_main_process


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IN_GRID, COLUMNS = 64, 8
SAMPLES = "samples.json"


parser = CommandParser(__doc__)
group = parser.add_argument_group("what makes the images")
group.add_argument("--model_name_or_path", required=True, help="A generator: folder or hub repository.")
group.add_argument("--revision", help="Branch, tag or commit of a hub repository.")
group.add_argument("--tokenizer", help="The image tokenizer, if it is not where the generator's vocabulary.json says.")
group = parser.add_argument_group("which images")
group.add_argument("--num_images", type=whole_number(), default=16, help="How many (default: 16).")
group.add_argument("--seed", type=whole_number(0), default=0, help="Seed of the first image (default: 0).")
group.add_argument("--classes", nargs="+", help="Names or numbers of classes, taken in turn (default: all).")
group.add_argument("--texts", nargs="+", help="Descriptions, taken in turn, for a generator that reads texts.")
group.add_argument(
    "--complete", type=Path, metavar="IMAGE", help="Keep the upper rows of this image and draw the rest."
)
group.add_argument("--keep_rows", type=int, help="With --complete: rows of tokens to keep (default: half of them).")
group = parser.add_argument_group("how codes are drawn")
group.add_argument(
    "--guidance_scale",
    type=float,
    default=1.0,
    help="1 (default): no guidance. More: images nearer to the class or text, and less variety.",
)
group.add_argument("--temperature", type=float, default=1.0, help="Less is safer, 0 always the likeliest (default: 1).")
group.add_argument("--top_k", type=int, default=0, help="Draw from the likeliest codes alone; 0 (default): from all.")
group.add_argument(
    "--top_p",
    type=float,
    default=1.0,
    help="Draw from the likeliest codes, which together have this probability (default: 1, all).",
)
group = parser.add_argument_group("how it runs")
group.add_argument("--batch_size", type=whole_number(), default=16, help="Images at a time (default: 16).")
group.add_argument("--dtype", choices=DTYPES, default="float32", help="Of the generator's weights (default: float32).")
group.add_argument("--device", type=present_device, help="Default: cuda where there is one.")
group.add_argument("--output_dir", required=True, type=Path, help="Where the images go.")


def condition_list(
    vocabulary: Vocabulary, classes: list[str] | None, texts: list[str] | None, encode_text, completes: bool
) -> tuple[list, list]:
    """Conditions for `generate_tokens`, and how they are called in samples.json; image i has number i modulo their
    number. Without `classes` and `texts`: all classes or, to complete an image, the null condition.

    Raises:
        ValueError: a condition that the generator does not know, or none where it needs one.
    """
    if classes is not None:
        numbers = [vocabulary.class_number(name) for name in classes]
        return numbers, [vocabulary.class_names[number] for number in numbers]
    if texts is not None:
        if vocabulary.condition != "text":
            raise ValueError(f"--texts: this generator reads no texts (its condition is '{vocabulary.condition}').")
        return [encode_text(text) for text in texts], texts
    if vocabulary.condition == "class" and not (completes and vocabulary.has_null):
        return list(range(vocabulary.num_conditions)), vocabulary.class_names
    if not vocabulary.has_null:
        raise ValueError("--texts: this generator was trained with --condition_dropout 0, it needs a text.")
    return [None], [None]


def check_settings(output: Path, settings: dict) -> None:
    """
    Raises:
        ValueError: the folder has images of other settings, or something else is in it under the name of ours.
    """
    if not (output / SAMPLES).is_file():
        if next(output.glob("[0-9]*.png"), None):
            raise ValueError(f"{output} has images and no {SAMPLES} that says of what: choose another --output_dir.")
        return
    before = read_fields(output / SAMPLES).get("settings", {})
    if different := sorted(name for name in before.keys() | settings if before.get(name) != settings.get(name)):
        name = different[0]
        raise ValueError(
            f"{output} has images of other settings ({name}: {before.get(name)} there, {settings.get(name)} here): "
            "choose another --output_dir."
        )


def write_samples(output: Path, names: dict, settings: dict, called: list, count: int) -> None:
    """Writes samples.json; images that another run made with the same settings are still in it.

    Args:
        names: where generator and tokenizer are, which the images do not depend on.
    """
    numbers = (int(file.stem) for file in output.glob("[0-9]*.png") if file.stem.isdecimal())  # no "000001 copy.png"
    count = max(count, 1 + max(numbers, default=-1))
    images = [
        {"file": f"{i:06d}.png", "seed": settings["seed"] + i, "condition": called[i % len(called)]}
        for i in range(count)
    ]
    content = {**names, "settings": settings, "versions": library_versions(), "images": images}
    write_whole(output / SAMPLES, lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))


@ends_in_one_line(smaller="--batch_size")
def main() -> None:
    args = parser.parse_args()
    if args.keep_rows is not None and args.complete is None:
        raise ValueError("--keep_rows has no effect: it is of --complete.")
    if args.classes and args.texts:
        raise ValueError("Pass --classes or --texts, not both.")

    state = PartialState(cpu=args.device is not None and args.device.type == "cpu")
    device = args.device or state.device
    if state.is_main_process:
        print(f"Loading the generator {args.model_name_or_path} (downloaded if it is not here).", flush=True)
    model, vocabulary = load_generator(args.model_name_or_path, device, DTYPES[args.dtype], args.revision)
    drawing = {name: getattr(args, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    check_options(vocabulary, **drawing)
    encode_text = None
    if args.texts and vocabulary.condition == "text":
        encode_text = load_text_encoder(args.model_name_or_path, args.revision)
    conditions, called = condition_list(vocabulary, args.classes, args.texts, encode_text, args.complete is not None)
    if state.is_main_process:
        print(f"Loading the tokenizer {args.tokenizer or vocabulary.model_name_or_path}.", flush=True)
    tokenizer = load_painter(vocabulary, args.tokenizer, device)
    first = None
    if args.complete is not None:
        image = read_image(str(args.complete), str(args.complete))
        pixels = grid_processor(tokenizer, vocabulary)(image, return_tensors="pt").pixel_values
        first = first_rows(tokenizer, vocabulary, pixels, args.keep_rows)
    names = {"generator": args.model_name_or_path, "tokenizer": args.tokenizer or vocabulary.model_name_or_path}
    settings = {
        "weights_sha256": weights_hash(model),
        "tokenizer_hash": vocabulary.tokenizer_hash,
        "decoder_sha256": weights_hash(tokenizer.decoder),
        "dtype": args.dtype,
        "conditions": called,
        "seed": args.seed,
        **drawing,
        "first_tokens": None if first is None else first.tolist(),
    }

    def begin() -> None:
        check_settings(args.output_dir, settings)
        write_samples(args.output_dir, names, settings, called, args.num_images)

    on_main_process(begin)
    missing = [i for i in range(args.num_images) if not (args.output_dir / f"{i:06d}.png").exists()]
    state.wait_for_everyone()  # all have looked before one writes
    if len(missing) < args.num_images and state.is_main_process:
        print(f"{counted(args.num_images - len(missing), 'image is', 'images are')} there already.")
    own = missing[state.process_index :: state.num_processes]
    title = one_of_processes("Images", state.num_processes)
    with tqdm(total=len(own), unit="image", desc=title, disable=not state.is_main_process) as bar:
        for start in range(0, len(own), args.batch_size):
            numbers = own[start : start + args.batch_size]
            images = generate_images(
                model,
                vocabulary,
                tokenizer,
                [conditions[i % len(conditions)] for i in numbers],
                [args.seed + i for i in numbers],
                **drawing,
                first_tokens=first,
                cache="static" if device.type == "cuda" else "dynamic",
            )
            for number, image in zip(numbers, VQRAEImageProcessor().postprocess(images)):
                write_whole(
                    args.output_dir / f"{number:06d}.png", lambda path, image=image: image.save(path, format="PNG")
                )
            bar.update(len(numbers))
    state.wait_for_everyone()
    if state.is_main_process:
        files = [args.output_dir / f"{i:06d}.png" for i in range(min(args.num_images, IN_GRID))]
        pixels = torch.stack([pil_to_tensor(Image.open(file)) for file in files])
        save_rows([pixels / 255], args.output_dir / "grid.png", min(COLUMNS, len(files)))
        print(f"{counted(args.num_images, 'image')}, grid.png and {SAMPLES}: {args.output_dir}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
