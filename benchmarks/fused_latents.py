#!/usr/bin/env python
"""What to quantize: the map of the trade between painting and meaning, without training and after some minutes of it.

    python -m benchmarks.fused_latents --encoder DINOV2_SMALL --train_data images --heldout photos=PHOTOS emoji=EMOJI \\
        --output_dir runs/fused

Every row of --config (configs/fused_latents.json) is a model whose latents, codes and linear path are fitted to the
same training images (`initialize_codebook`). A row that is `like` an earlier one takes over what was fitted there and
has another decoder, so that decoders can be compared on the same tokens. For each set of held-out images the table has

- PSNR and blocking before any step, and after --minutes or --steps of training the decoder on tokens, on mean absolute
  and squared errors of pixels and mean absolute errors of their differences (--loss_weights);
- lost: share of the last layer's variance that is lost between encoder and codes (1 - R2), on the first set;
- used: share of the codes that its tokens use;
- kNN: with --probe FOLDER_WITH_CLASSES, accuracy on the quantized latents over that on the encoder's features.

A row that is done is not done again. Writes results.json, table.md and map.png, and in a folder for each row its
pictures, what was `fitted` and what was `trained`, both of which load as models.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from eval.blocking.blocking import blocking_of, count_steps
from eval.commands import CommandParser, ends_in_one_line
from eval.files import write_whole
from eval.metrics import to_uint8
from eval.options import whole_number
from eval.pictures import save_rows
from eval.probe import accuracy_of_neighbours, encode_images, labelled_images
from eval.psnr.psnr import psnr_per_image
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import ImageTokenizer, VQRAEModel
from reading.files import dataset_of_files, find_images
from training.data import EvalTransform, sample_indices
from training.losses import gradient_loss


FITTED_TO = ("encoder", "train_data", "train_images", "latents_per_code")  # options that decide what is fitted
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "fused_latents.json"


def read(path: str, processor: VQRAEImageProcessor, count: int) -> tuple[torch.Tensor, list[Path]]:
    """(B, 3, size, size) in [0, 1] of images of a folder or list, drawn by a seed (0: all); and their files."""
    files = find_images(path)
    files = [files[i] for i in sample_indices(len(files), count or len(files), seed=0)]
    transform, records = EvalTransform(processor), dataset_of_files(files)["image"]
    pixels = [transform({"image": [record]})["pixel_values"][0] for record in tqdm(records, desc=f"Reading {path}")]
    return torch.stack(pixels), files


def painted(made: torch.Tensor, images: torch.Tensor, patch_size: int) -> dict[str, float]:
    """PSNR in dB and blocking of reconstructions; both (B, 3, height, width) of uint8."""
    return {
        "psnr": psnr_per_image(made / 255, images / 255).mean().item(),
        "blocking": blocking_of(count_steps(made, patch_size), count_steps(images, patch_size)),
    }


@torch.no_grad()
def tokens_of(model: VQRAEModel, pixels: torch.Tensor, batch_size: int = 16) -> torch.Tensor:
    """(B, h, w), on the CPU."""
    parts = tqdm(pixels.split(batch_size), desc="Tokens", unit="batch", leave=False)
    return torch.cat([model.get_image_tokens(part.to(model.device)).cpu() for part in parts])


@torch.no_grad()
def measure(model: VQRAEModel, pixels: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """PSNR, blocking and used codes of held-out images; and the reconstructions."""
    model.eval()
    tokens = tokens_of(model, pixels)
    parts = tqdm(tokens.split(16), desc="Decoding", unit="batch", leave=False)
    fake = torch.cat([model.decode(part.to(model.device)).decoded_pixel_values.cpu() for part in parts])
    numbers = painted(to_uint8(fake), to_uint8(pixels), model.config.decoder_patch_size)
    return {**numbers, "used": len(tokens.unique()) / model.config.codebook_size}, fake.clamp(0, 1)


@torch.no_grad()
def lost(model: VQRAEModel, train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Share of the variance of the last layer's features that is not explained by the codes: of fused latents by what
    comes back from them, of others by the mean feature that each code had in training."""

    def parts(pixels: torch.Tensor):
        for part in tqdm(pixels.split(16), desc="What is lost", unit="batch", leave=False):
            yield model.encode(part.to(model.device))

    width, explained = model.config.hidden_size, None
    if not model.config.pixel_weight:
        model.quantizer.reset_codebook_usage()
        sums = torch.zeros(model.config.codebook_size, width, device=model.device)
        for encoded in parts(train):
            sums.index_add_(0, encoded.image_tokens.flatten(), encoded.last_hidden_state.flatten(0, 1))
        counts = model.quantizer.get_codebook_counts().clamp_min(1)
        explained = sums / counts[:, None]
    error = total = squares = count = 0
    for encoded in parts(held_out):
        features = encoded.last_hidden_state.flatten(0, 1).double()
        quantized = encoded.quantized_last_hidden_state[..., :width].flatten(0, 1)
        if explained is not None:
            quantized = explained[encoded.image_tokens.flatten()]
        error += (features - quantized).square().sum(0)
        total, squares, count = total + features.sum(0), squares + features.square().sum(0), count + len(features)
    return (error.sum() / (squares - total.square() / count).sum()).item()


def train(
    model: ImageTokenizer,
    pixels: torch.Tensor,
    tokens: torch.Tensor | None,
    minutes: float,
    steps: int = 0,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    loss_weights: tuple[float, float, float] = (1.0, 0.5, 0.0),
) -> int:
    """The decoder on tokens, or without them all that can be trained, by AdamW, whose rate is warmed up and then falls
    to zero over the time, or over so many steps; returns their number. `loss_weights` are those of the options."""
    l1_weight, gradient_weight, l2_weight = loss_weights
    model.train()
    parameters = [p for p in (model if tokens is None else model.decoder).parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.05)
    generator, start, done = torch.Generator().manual_seed(0), time.monotonic(), 0
    bar = tqdm(total=steps or round(60 * minutes), desc="Training", unit="step" if steps else "s")
    while (spent := done / steps if steps else (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (done + 1) / 50) * (1 - spent)
        chosen = torch.randint(len(pixels), (batch_size,), generator=generator)
        target = pixels[chosen].to(model.device)
        known = None if tokens is None else tokens[chosen].to(model.device)
        output = model(target, image_tokens=known, return_loss=False)
        made = output.decoded_pixel_values
        loss = l1_weight * F.l1_loss(made, target) + gradient_weight * gradient_loss(made, target)
        loss = loss + l2_weight * F.mse_loss(made, target)
        optimizer.zero_grad()
        (loss if output.embedding_loss is None else loss + output.embedding_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        done += 1
        bar.update(round(bar.total * spent) - bar.n)
    bar.update(bar.total - bar.n)
    bar.close()
    return done


def take_fit(model: VQRAEModel, fitted: VQRAEModel) -> None:
    """`model` gets all that was fitted, but for a linear path of another size: the rest of its decoder is its own."""
    for name in ("encoder", "project_in", "project_out", "quantizer"):
        getattr(model, name).load_state_dict(getattr(fitted, name).state_dict())
    if kernel_size := model.config.decoder_linear_path:
        if kernel_size != fitted.config.decoder_linear_path:
            raise ValueError(f"A row with decoder_linear_path {kernel_size} must be fitted itself: leave out 'like'.")
        model.decoder.linear_path.load_state_dict(fitted.decoder.linear_path.state_dict())


def folder_of(output: Path, name: str) -> Path:
    """Of a row."""
    return output / "".join(c if c.isalnum() else "-" for c in name)


def choice_of(settings: dict, name: str) -> tuple[dict, str | None]:
    """Fields of `VQRAEConfig` of a row of --config, and the row that it is `like`."""
    own = dict(settings["rows"][name])
    like = own.pop("like", None)
    fused = {} if (like or name) in settings["not_fused"] else settings["fused"]
    return settings["common"] | fused | settings["rows"][like or name] | own, like


def check_fit(file: Path, fields: dict, args: argparse.Namespace) -> None:
    """Whether what another row is like was fitted to the same images in the same way.

    Raises:
        ValueError: it is not there, or was not.
    """
    if not file.exists():
        raise ValueError(f"{file} is not there, and a row is like it: do that one before.")
    there = json.loads(file.read_text())["made_from"]
    here = {"fields": fields} | {name: str(getattr(args, name)) for name in FITTED_TO}
    if other := [name for name in here if there[name] != here[name]]:
        raise ValueError(f"{file} was fitted with another {other[0]}, and a row is like it: name a new --output_dir.")


def row(fields: dict, like: str | None, args: argparse.Namespace, data: dict, output: Path) -> dict:
    """Everything of one row; its models and pictures are written."""
    torch.manual_seed(0)
    model = VQRAEModel.from_encoder_pretrained(args.encoder, **fields).eval().to(args.device)
    if like:
        source = folder_of(args.output_dir, like)
        take_fit(model, VQRAEModel.from_pretrained(source / "fitted"))
        tokens = load_file(source / "tokens.safetensors")["train"]
        earlier = json.loads((source / "row.json").read_text())["numbers"]
        numbers = {key: earlier[key] for key in ("latents_fit", "lost", "probe") if key in earlier}
    else:
        start = time.monotonic()
        model.initialize_codebook(data["train"].split(16), latents_per_code=args.latents_per_code)
        numbers = {"fit_seconds": time.monotonic() - start, "latents_fit": model.config.latents_fit}
        model.save_pretrained(output / "fitted")
        tokens = tokens_of(model, data["train"])
        write_whole(output / "tokens.safetensors", lambda path: save_file({"train": tokens}, path))
        numbers["lost"] = lost(model, data["train"], next(iter(data["heldout"].values())))
        if data["probe"]:
            processor = VQRAEImageProcessor.for_image_size(model.config.image_size)
            vectors = encode_images(model, data["probe"]["images"], processor, 16)
            scores = {name: accuracy_of_neighbours(vectors[name], data["probe"]["labels"]) for name in vectors}
            numbers["probe"] = {name: score.mean().item() for name, score in scores.items() if name != "bags of tokens"}
    rows = {}
    for name, pixels in data["heldout"].items():
        numbers[name], fake = measure(model, pixels)
        rows[name] = [pixels[:12], fake[:12]]
    if args.minutes or args.steps:
        numbers["steps"] = train(
            model,
            data["train"],
            tokens,
            args.minutes,
            args.steps,
            args.batch_size,
            args.learning_rate,
            args.loss_weights,
        )
        model.save_pretrained(output / "trained")
        for name, pixels in data["heldout"].items():
            trained, fake = measure(model, pixels)
            numbers[name] |= {f"trained_{key}": value for key, value in trained.items()}
            rows[name].append(fake[:12])
    for name, pictures in rows.items():
        save_rows(pictures, output / f"{name}.png", columns=12)
    return numbers


def table(results: dict, sets: list[str]) -> str:
    """Markdown."""
    trained = any("steps" in numbers for numbers in results.values())
    heads = [f"{name}: PSNR, blocking" + (", after training" if trained else "") for name in sets]
    lines = [f"| what is quantized | {' | '.join(heads)} | lost | used | kNN |"]
    lines.append(f"| --- |{' ---: |' * (len(heads) + 3)}")
    for name, numbers in results.items():
        cells = []
        for part in sets:
            cell = f"{numbers[part]['psnr']:.2f}, {numbers[part]['blocking']:.2f}"
            if "trained_psnr" in numbers[part]:
                cell += f", {numbers[part]['trained_psnr']:.2f}, {numbers[part]['trained_blocking']:.2f}"
            cells.append(cell)
        probe = numbers.get("probe")
        kept = f"{probe['quantized latents'] / probe['encoder features']:.2f}" if probe else "-"
        cells += [f"{numbers['lost']:.3f}", f"{numbers[sets[0]]['used']:.1%}", kept]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: dict, sets: list[str], path: Path) -> None:
    """PSNR over the share of the last layer that is lost, a point for each row and set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(sets), figsize=(6 * len(sets), 5), squeeze=False)
    for axis, part in zip(axes[0], sets):
        for name, numbers in results.items():
            axis.scatter(numbers["lost"], numbers[part]["psnr"], s=16, color="C0")
            axis.annotate(
                name, (numbers["lost"], numbers[part]["psnr"]), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
            if "trained_psnr" in numbers[part]:
                axis.scatter(numbers["lost"], numbers[part]["trained_psnr"], s=16, color="C1")
        after = ", after training (orange)" if any("steps" in numbers for numbers in results.values()) else ""
        axis.set(title=f"{part}: before any step (blue){after}", ylabel="PSNR, dB")
        axis.set_xlabel("share of the last layer's variance that is lost")
    figure.tight_layout()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))


parser = CommandParser(__doc__)
parser.add_argument("--encoder", required=True, help="A pretrained vision encoder (hub or folder).")
parser.add_argument("--train_data", required=True, help="Images to fit to: a folder, or a .txt file that lists them.")
parser.add_argument("--heldout", required=True, nargs="+", help="NAME=PATH of held-out images, the main set first.")
parser.add_argument("--config", type=Path, default=CONFIG, help="The rows (default: configs/fused_latents.json).")
parser.add_argument("--rows", nargs="+", help="Names of some of them (default: all).")
parser.add_argument("--train_images", type=int, default=400, help="How many to fit to (default: 400).")
parser.add_argument("--heldout_images", type=int, default=60, help="Of each set (default: 60).")
parser.add_argument("--latents_per_code", type=int, default=32, help="For k-means (default: 32).")
length = parser.add_mutually_exclusive_group()
length.add_argument("--minutes", type=float, default=0.0, help="Train each decoder that long (default: 0, not).")
length.add_argument("--steps", type=int, default=0, help="Train each decoder for so many steps.")
parser.add_argument("--batch_size", type=whole_number(), default=8, help="Images of a step (default: 8).")
parser.add_argument("--learning_rate", type=float, default=1e-3, help="The highest (default: 1e-3).")
parser.add_argument(
    "--loss_weights",
    type=float,
    nargs=3,
    default=(1.0, 0.5, 0.0),
    metavar=("L1", "GRADIENTS", "L2"),
    help="Of mean absolute errors of pixels and of their differences, and of squared ones (default: 1 0.5 0).",
)
parser.add_argument("--probe", help="A folder whose sub-folders are classes, for kNN.")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: a GPU).")
parser.add_argument("--output_dir", required=True, type=Path, help="Where results go.")


@ends_in_one_line()
def main() -> None:
    args = parser.parse_args()
    settings = json.loads(args.config.read_text())
    names = args.rows or list(settings["rows"])
    if unknown := [name for name in names if name not in settings["rows"]]:
        raise ValueError(f"--rows: {args.config} has no row '{unknown[0]}', only {', '.join(settings['rows'])}.")
    if unnamed := [pair for pair in args.heldout if "=" not in pair]:
        raise ValueError(f"--heldout {unnamed[0]} has no name: write NAME=PATH, such as photos={unnamed[0]}.")
    sets = dict(pair.split("=", 1) for pair in args.heldout)
    processor = VQRAEImageProcessor.for_image_size(settings["common"]["image_size"])
    data = {"train": read(args.train_data, processor, args.train_images)[0]}
    data["heldout"] = {name: read(path, processor, args.heldout_images)[0] for name, path in sets.items()}
    data["probe"] = None
    if args.probe:
        images, labels, _ = labelled_images(args.probe)
        data["probe"] = {"images": images, "labels": labels}
    results = {}
    for number, name in enumerate(names, 1):
        fields, like = choice_of(settings, name)
        if like:
            check_fit(folder_of(args.output_dir, like) / "row.json", choice_of(settings, like)[0], args)
        made_from = {"fields": fields, **{key: str(value) for key, value in vars(args).items() if key != "rows"}}
        folder = folder_of(args.output_dir, name)
        file = folder / "row.json"
        done = json.loads(file.read_text()) if file.exists() else {}
        if done.get("made_from") != json.loads(json.dumps(made_from)):
            print(f"Row {number} of {len(names)}: {name}", flush=True)
            done = {"made_from": made_from, "numbers": row(fields, like, args, data, folder)}
            write_whole(file, lambda path, done=done: path.write_text(json.dumps(done, indent=2) + "\n"))
        results[name] = done["numbers"]
        print(table({name: done["numbers"]}, list(sets)).splitlines()[-1], flush=True)
    write_whole(args.output_dir / "results.json", lambda path: path.write_text(json.dumps(results, indent=2) + "\n"))
    write_whole(args.output_dir / "table.md", lambda path: path.write_text(table(results, list(sets))))
    draw(results, list(sets), args.output_dir / "map.png")
    print(f"\n{table(results, list(sets))}\n{args.output_dir / 'map.png'}")


if __name__ == "__main__":
    main()
