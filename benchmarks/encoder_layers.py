#!/usr/bin/env python
"""What the layers of a vision encoder still know of pixels, and how much of it survives quantization.

    python -m benchmarks.encoder_layers --encoder DINOV2_SMALL --photos PHOTOS --emoji EMOJI

For each layer, and for the mean of each with the last one, prints for photographs and emoji of held-out sources

- linear: PSNR of pixels predicted from the features of their patch, by ridge regression;
- codes: PSNR where each token paints the mean patch that its k-means code had in training;
- used: share of the codes that held-out tokens use;
- last: share of the last layer's variance that the codes lose (1 - R2), of what features are for.

No decoder, no training: a few minutes on two CPU cores.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from eval.commands import ends_in_one_line
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from quantization_simvq import SimVQ
from reading.models import loading
from reading.sources import dataset_of_files, find_images
from training.data import EvalTransform, split_files


def read(files: list[Path], size: int) -> torch.Tensor:
    """(B, 3, size, size) in [0, 1]."""
    transform = EvalTransform(VQRAEImageProcessor.for_image_size(size))
    return torch.stack(transform({"image": dataset_of_files(files)["image"]})["pixel_values"])


@torch.no_grad()
def features_of(model: VQRAEModel, pixels: torch.Tensor, layers: list[int]) -> dict[int, torch.Tensor]:
    """Normalised outputs of layers, each (B * tokens, width)."""
    collected = {layer: [] for layer in layers}
    tokens, side = model.config.grid_size**2, model.config.encoder_input_size
    for batch in tqdm(pixels.split(8), desc="Encoding", unit="batch"):
        seen = model._normalize(F.interpolate(batch, size=(side, side), mode="bicubic", align_corners=False))
        hidden_states = model.encoder(seen, output_hidden_states=True).hidden_states
        for layer in layers:
            collected[layer].append(model.encoder_norm(hidden_states[layer][:, -tokens:]).flatten(0, 1))
    return {layer: torch.cat(parts) for layer, parts in collected.items()}


def psnr(patches: torch.Tensor, truth: torch.Tensor, num_images: int) -> float:
    """Mean over images of the PSNR of (images * tokens, patch pixels)."""
    error = (patches.clamp(0, 1) - truth).square().view(num_images, -1).mean(1)
    return (-10 * error.log10()).mean().item()


def linear(features: torch.Tensor, targets: torch.Tensor, ridge: float = 1e-3) -> torch.Tensor:
    """(width + 1, out): ridge regression with an offset."""
    x = F.pad(features, (0, 1), value=1.0).double()
    normal = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.linalg.solve(normal, x.T @ targets.double()).float()


@torch.no_grad()
def measure(train: dict, held_out: dict, codes: int, seed: int) -> list[str]:
    """The cells of one row.

    Args:
        train: `features`, `patches`, `last` (features of the last layer) of training images.
        held_out: the same by the name of the kind of images, with `images`, their number.
    """
    weight = linear(train["features"], train["patches"])
    quantizer = SimVQ(codes, train["features"].shape[1]).eval()
    quantizer.fit(train["features"], iterations=6, seed=seed)
    nearest = quantizer(train["features"][None])[2][0]
    counts = torch.bincount(nearest, minlength=codes).clamp_min(1)[:, None]

    def means(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(codes, values.shape[1]).index_add_(0, nearest, values) / counts

    mean_patch, mean_last = means(train["patches"]), means(train["last"])
    cells = []
    for part in held_out.values():
        tokens = quantizer(part["features"][None])[2][0]
        predicted = F.pad(part["features"], (0, 1), value=1.0) @ weight
        lost = (part["last"] - mean_last[tokens]).square().sum()
        lost /= (part["last"] - part["last"].mean(0)).square().sum()
        cells += [
            f"{psnr(predicted, part['patches'], part['images']):.2f}",
            f"{psnr(mean_patch[tokens], part['patches'], part['images']):.2f}",
            f"{len(tokens.unique()) / codes:.1%}",
            f"{lost.item():.3f}",
        ]
    return cells


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="A pretrained vision encoder (hub or folder).")
    parser.add_argument("--photos", required=True, help="Folder of photographs, split by names up to the first '-'.")
    parser.add_argument("--emoji", required=True, help="Folder of emoji, split likewise.")
    parser.add_argument("--image_size", type=int, default=224, help="Side in pixels (default: 224).")
    parser.add_argument("--patch_size", type=int, default=14, help="Pixels a token stands for (default: 14).")
    parser.add_argument("--layers", type=int, nargs="+", help="Layers (default: 1, 2, 4, 8 and the last).")
    parser.add_argument("--codes", type=int, default=4096, help="Number of codes (default: 4096).")
    parser.add_argument("--train_images", type=int, default=250, help="Images of each kind (default: 250).")
    parser.add_argument("--heldout_images", type=int, default=40, help="Images of each kind (default: 40).")
    parser.add_argument("--seed", type=int, default=0, help="Of the choice of images, and of k-means (default: 0).")
    args = parser.parse_args(arguments)

    fields = {"image_size": args.image_size, "decoder_patch_size": args.patch_size, "decoder_num_hidden_layers": 1}
    with loading(args.encoder):
        model = VQRAEModel.from_encoder_pretrained(args.encoder, **fields).eval()
    last = model.config.encoder_config.num_hidden_layers
    layers = args.layers or [layer for layer in (1, 2, 4, 8) if layer < last]
    layers = [*[layer for layer in layers if layer != last], last]

    order = torch.Generator().manual_seed(args.seed)
    train_files, held_out_files = [], {}
    for kind, folder, holdout in (("photographs", args.photos, 0.15), ("emoji", args.emoji, 0.1)):
        parts = split_files(find_images(folder), holdout, "-")
        train, held_out = ([part[i] for i in torch.randperm(len(part), generator=order)] for part in parts)
        train_files += train[: args.train_images]
        held_out_files[kind] = held_out[: args.heldout_images]

    def prepared(files: list[Path]) -> dict:
        pixels = read(files, args.image_size)
        patches = F.unfold(pixels, args.patch_size, stride=args.patch_size).transpose(1, 2).flatten(0, 1)
        return {"layers": features_of(model, pixels, layers), "patches": patches, "images": len(files)}

    parts = {"train": prepared(train_files)} | {kind: prepared(files) for kind, files in held_out_files.items()}
    print(
        f"\n{args.encoder}: {len(train_files)} images of {args.image_size} px to fit, "
        + ", ".join(f"{len(files)} {kind}" for kind, files in held_out_files.items())
        + f" held out; {args.patch_size} px a token, {args.codes:,} codes.\n"
    )
    names = [f"{kind}: {what}" for kind in held_out_files for what in ("linear", "codes", "used", "last")]
    print(f"| layers | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}")
    for combination in [[layer] for layer in layers] + [[layer, last] for layer in layers[:-1]]:
        row = {
            name: {
                "features": torch.stack([part["layers"][layer] for layer in combination]).mean(0),
                "last": part["layers"][last],
                "patches": part["patches"],
                "images": part["images"],
            }
            for name, part in parts.items()
        }
        cells = measure(row.pop("train"), row, args.codes, args.seed)
        print(f"| {', '.join(map(str, combination))} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
