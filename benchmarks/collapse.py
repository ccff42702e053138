#!/usr/bin/env python
"""Why the codes of a tokenizer fall out of use on frozen features, and what keeps them in use.

    python -m benchmarks.collapse --encoder DINOV2_SMALL --data PHOTOS EMOJI --output_dir runs/collapse

Four parts, each a table in results.md (configs/collapse.json holds every number; --config for others):

quantizer  the quantizer alone on features of a frozen encoder, no decoder: how the codes start, and the learning rate
           of W; only the loss of the codebook moves anything.
stage1     encoder frozen, quantizer and decoder trained with L1 + L2 pixels and the loss of the quantizer: a plain
           learnable codebook, SimVQ as in the reference, and SimVQ with k-means codes, at several sizes, each for the
           same steps; and behind the learnable projection to 1,536 dimensions of VQRAE.
moving     the pretrained encoder trained too, at a low learning rate; without and with self-distillation (the mean
           squared error between its features and the original encoder's, weight 1, as in VQRAE).
joint      a small ViT from random weights trained with quantizer and decoder; also with the rotation trick (arXiv
           2410.06424) instead of the straight-through gradient, by vector_quantize_pytorch.

Images are split by file name up to the first '-' (one photograph gives many crops). Random crops of the training
images are encoded once (float16 features on disk): the encoder is frozen, and every run meets the same crops in the
same order. All is kept in --output_dir: an interrupted run goes on with the part, and the crops, that are missing.

Usage is the share of codes used, and perplexity exp of the entropy of their frequencies, over the latest tokens of
training (64 per code once there were as many), and over all crops now and then. Distortion is the mean squared error
of the quantizer divided by the variance of the features. PSNR and LPIPS (AlexNet, if its weights are there) are of
held-out images.
"""

import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from configuration_simvq import VQRAEConfig
from eval.codebook_usage.codebook_usage import codebook_statistics
from eval.commands import CommandParser, ends_in_one_line
from eval.files import read_fields, write_whole
from eval.metrics import CodebookWindow, to_uint8
from eval.networks import load_networks
from eval.pictures import save_rows
from eval.protocol import Protocol
from eval.psnr.psnr import psnr_per_image
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from quantization_simvq import SimVQ, VectorQuantizer
from reading.files import find_images
from reading.images import BELOW
from reading.models import loading
from training.data import EvalTransform, TrainTransform, split_files


ROOT = Path(__file__).resolve().parents[1]


ARMS = ("plain codebook", "SimVQ, Gaussian", "SimVQ, k-means")  # and, where a run says so, "more"
CHUNK = 1024  # crops in a file


def keep_apart(inputs: dict, file: Path) -> None:
    """Writes down what the runs of a folder are made from, for those that go on with them.

    Raises:
        ValueError: the folder has runs that were made from something else.
    """
    if file.exists() and (others := json.loads(file.read_text())) != inputs:
        differing = ", ".join(name for name in inputs if others.get(name) != inputs[name])
        raise ValueError(
            f"{file.parent} has runs of other {differing}: choose another --output_dir, or remove it ({file.name} "
            "tells what they are of)."
        )
    write_whole(file, lambda path: path.write_text(json.dumps(inputs, indent=2) + "\n"))


# Data ----------------------------------------------------------------------------------------------------------------


class Crops:
    """Random crops of the training images with their features, and held-out images with theirs.

    Attributes:
        pixels: (crops, 3, size, size), uint8.
        features: (crops, tokens, width), float16.
        held_out: the same for held-out images, as `(pixels, features)`, float32.
        encoder: name or path of the encoder of the features.
    """

    def __init__(self, settings: dict, model: VQRAEModel, folders: list[str], cache: Path) -> None:
        train, held_out = [], []
        for folder in folders:
            parts = split_files(find_images(folder), settings["holdout"], "-")
            train += parts[0]
            step = max(1, len(parts[1]) // settings["held_out_per_folder"])
            held_out += parts[1][::step][: settings["held_out_per_folder"]]
        print(f"{len(train)} images to train on, {len(held_out)} held out.")
        transform = TrainTransform(settings["image_size"], settings["min_crop_area"])
        files = []
        for start in tqdm(range(0, settings["crops"], CHUNK), desc="Encoding crops", unit="chunk"):
            files.append(cache / f"crops-{start:07d}.safetensors")
            if files[-1].exists():
                continue
            torch.manual_seed(start)
            count = min(CHUNK, settings["crops"] - start)
            chosen = torch.randint(len(train), (count,)).tolist()
            pixels = torch.stack(transform({"image": [record(train[i]) for i in chosen]})["pixel_values"])
            chunk = {"pixels": to_uint8(pixels), "features": encode(model, to_uint8(pixels)).half()}
            write_whole(files[-1], lambda path, chunk=chunk: save_file(chunk, path))
        chunks = [load_file(file) for file in files]
        self.pixels = torch.cat([chunk["pixels"] for chunk in chunks])
        self.features = torch.cat([chunk["features"] for chunk in chunks])
        processor = VQRAEImageProcessor.for_image_size(settings["image_size"])
        pixels = torch.stack(EvalTransform(processor)({"image": [record(file) for file in held_out]})["pixel_values"])
        self.held_out = pixels, encode(model, to_uint8(pixels))

    def latents(self, count: int) -> torch.Tensor:
        """The features of the first crops, about (count, width), float32."""
        return self.features[: math.ceil(count / self.features.shape[1])].float().flatten(0, 1)


def record(file: Path) -> dict:
    """Called by its bare name, wherever the folder lies."""
    return {"path": f"{file.parent}{BELOW}{file.name}", "bytes": None}


@torch.no_grad()
def encode(model: VQRAEModel, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.get_image_features(part.float() / 255).last_hidden_state for part in pixels.split(64)])


# Measuring -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def count_codes(quantizer: VectorQuantizer, features: torch.Tensor, project: nn.Module) -> torch.Tensor:
    """(codes,) tokens of each code over (images, tokens, width) features."""
    quantizer.eval()
    quantizer.reset_codebook_usage()
    for part in tqdm(features.split(32), desc="Counting codes", unit="batch", leave=False):
        quantizer(project(part.float()))
    counts = quantizer.get_codebook_counts().clone()
    quantizer.reset_codebook_usage()
    quantizer.train()
    return counts


@torch.no_grad()
def distortion(quantizer: VectorQuantizer, latents: torch.Tensor) -> float:
    """Mean squared error of the quantizer over the variance of (images, tokens, width) latents."""
    quantizer.eval()
    quantized = torch.cat([quantizer(part)[0] for part in latents.split(32)])
    quantizer.reset_codebook_usage()
    quantizer.train()
    variance = (latents - latents.mean((0, 1))).square().mean()
    return (F.mse_loss(quantized, latents) / variance).item()


class Reconstruction:
    """PSNR and, where its weights can be had, LPIPS of held-out images."""

    def __init__(self, pixels: torch.Tensor) -> None:
        protocol = Protocol.load("default")
        self.pixels = to_uint8(pixels) / 255
        self.lpips = load_networks(protocol, torch.device("cpu"), names=["lpips_alex"])[0].lpips.get("lpips_alex")

    def __call__(self, reconstruction: torch.Tensor) -> dict[str, float | None]:
        rounded = to_uint8(reconstruction) / 255
        lpips = None
        if self.lpips:
            with torch.no_grad():
                parts = zip(rounded.split(32), self.pixels.split(32))
                lpips = torch.cat([self.lpips(*part, normalize=True) for part in parts]).mean().item()
        return {"psnr": psnr_per_image(rounded, self.pixels).mean().item(), "lpips": lpips}


# Runs ----------------------------------------------------------------------------------------------------------------


def start_codes(name: str, quantizer: VectorQuantizer, latents: torch.Tensor, run: dict) -> None:
    """The ways in which codes can start, on (N, dim) latents."""
    if name.startswith("SimVQ, k-means"):
        quantizer.fit(latents, run["iterations"])
    elif name == "SimVQ, drawn latents":
        quantizer.fit(latents, 0)
    elif name == "SimVQ, Gaussian, W and b matched":
        gaussian = quantizer.embedding.weight.clone()
        quantizer.fit(latents, 0)
        quantizer.embedding.weight.copy_(gaussian)


def rate_at(step: int, steps: int, settings: dict) -> float:
    """Linear warm-up, then cosine to a tenth."""
    warm = min(1.0, (step + 1) / settings["warmup_steps"])
    return warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def quantizer_run(name: str, multiplier: float, settings: dict, crops: Crops) -> dict:
    """The quantizer alone: its loss on features, learning rate as in stage 1 times `multiplier`."""
    run = settings["quantizer"]
    torch.manual_seed(0)
    quantizer = SimVQ(run["codes"], crops.features.shape[-1], legacy=False)
    start_codes(name, quantizer, crops.latents(run["latents_per_code"] * run["codes"]), run)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=settings["learning_rate"] * multiplier, weight_decay=1e-4)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, run["steps"], settings))
    sample = crops.features[: math.ceil(8 * run["codes"] / crops.features.shape[1])]

    def measure(step):
        statistics = codebook_statistics(count_codes(quantizer, sample, nn.Identity()))
        statistics["distortion"] = distortion(quantizer, crops.held_out[1])
        return statistics | {"step": step, "norm_of_W": quantizer.embedding_proj.weight.norm().item()}

    history = [measure(0)]
    for step in tqdm(range(run["steps"]), desc=f"{name}, learning rate x {multiplier:g}", unit="step"):
        batch = torch.arange(step * settings["batch_size"], (step + 1) * settings["batch_size"]) % len(crops.features)
        quantizer(crops.features[batch].float())[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if step + 1 in (run["steps"] // 4, run["steps"]):
            history.append(measure(step + 1))
    return {"history": history}


def train_run(part: str, name: str, codes: int, settings: dict, crops: Crops, folder: Path) -> dict:
    """Trains a tokenizer: on cached features ("stage1"), or from pixels with its encoder ("moving", "joint")."""
    run = settings[part][str(codes)]
    from_pixels = part != "stage1"
    size, patch = settings["image_size"], settings["small_vit"]["patch_size"]
    fields = {"image_size": size, "codebook_size": codes, "legacy": False, "freeze_encoder": not from_pixels}
    fields |= settings["decoder"] | {"use_simvq": name != "plain codebook"}
    if "projected to 1,536" in name:
        fields["codebook_dim"] = 1536
    torch.manual_seed(0)
    if part == "joint":
        fields |= {"encoder_config": settings["small_vit"], "encoder_input_size": size, "decoder_patch_size": patch}
        fields |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        model = VQRAEModel(VQRAEConfig(**fields))
    else:
        model = VQRAEModel.from_encoder_pretrained(crops.encoder, **fields)
    model.train()
    start = time.time()
    needed = run["latents_per_code"] * codes
    if from_pixels and name.startswith("SimVQ, k-means"):
        images = math.ceil(needed / crops.features.shape[1])
        batches = (crops.pixels[i % len(crops.pixels)][None].float() / 255 for i in range(images))
        model.initialize_codebook(batches, run["latents_per_code"], run["iterations"])
    elif not from_pixels:
        with torch.no_grad():
            start_codes(name, model.quantizer, model.project_in(crops.latents(needed)), run)
    seconds_to_start = time.time() - start
    groups = {"fast": [], "slow": []}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["slow" if part == "moving" and parameter_name.startswith("encoder.") else "fast"].append(parameter)
    optimizer = torch.optim.AdamW(groups["fast"], lr=settings["learning_rate"], weight_decay=1e-4)
    if groups["slow"]:
        optimizer.add_param_group({"params": groups["slow"], "lr": settings["encoder_learning_rate"]})
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, run["steps"], settings))
    measure, window = Reconstruction(crops.held_out[0]), CodebookWindow(codes)
    grid = (size // patch,) * 2

    def forward(pixels, original):
        """Reconstruction, loss besides that of the pixels, and features; `original` are the pretrained encoder's."""
        features = model.get_image_features(pixels).last_hidden_state if from_pixels else original
        latents = model.project_in(features)
        quantized, loss, _ = model.quantizer(latents)
        if "rotation trick" in name:
            quantized = rotate_to(latents, quantized.detach())
        if "distilled" in name:
            loss = loss + F.mse_loss(features, original)
        return model.decode_latents(model.project_out(quantized), grid).decoded_pixel_values, loss, latents

    def evaluate(step, losses):
        counts = window.add(model.quantizer.get_codebook_counts())
        model.eval()
        model.quantizer.reset_codebook_usage()
        with torch.no_grad():
            parts = [forward(x, z) for x, z in zip(*(tensor.split(32) for tensor in crops.held_out))]
        reconstruction, latents = torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])
        held_out = codebook_statistics(model.quantizer.get_codebook_counts())
        model.train()
        statistics = {"step": step, **measure(reconstruction), "held_out": held_out}
        statistics["distortion"] = distortion(model.quantizer, latents)
        if step:
            statistics |= codebook_statistics(counts) | {"loss": sum(losses) / len(losses)}
        if step and not from_pixels and step % run["count_all_crops_every"] == 0:
            everything = count_codes(model.quantizer, crops.features, model.project_in)
            statistics["all_crops"] = codebook_statistics(everything)
        return statistics, reconstruction

    history, losses = [evaluate(0, [])[0]], []
    for step in tqdm(range(run["steps"]), desc=f"{name}, {codes:,} codes", unit="step"):
        batch = torch.arange(step * settings["batch_size"], (step + 1) * settings["batch_size"]) % len(crops.pixels)
        pixels = crops.pixels[batch].float() / 255
        reconstruction, other_losses, _ = forward(pixels, crops.features[batch].float())
        loss = F.l1_loss(reconstruction, pixels) + F.mse_loss(reconstruction, pixels) + other_losses
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        window.add(model.quantizer.get_codebook_counts())
        model.quantizer.reset_codebook_usage()
        if (step + 1) % (run["steps"] // 8) == 0:
            statistics, reconstruction = evaluate(step + 1, losses)
            history.append(statistics)
            losses = []
    result = {"history": history, "seconds_to_start": seconds_to_start, "seconds": time.time() - start}
    write_whole(
        folder / "reconstructions.safetensors", lambda path: save_file({"pixels": to_uint8(reconstruction)}, path)
    )
    return result


# Report --------------------------------------------------------------------------------------------------------------


def report(results: dict[str, dict], crops: Crops, output: Path) -> None:
    lines = []
    rows = {key: result for key, result in results.items() if key.startswith("quantizer/")}
    if rows:
        steps = [entry["step"] for entry in next(iter(rows.values()))["history"]]
        tokens = next(iter(rows.values()))["history"][0]["codebook_tokens"]
        lines += [
            "### Quantizer alone",
            "",
            f"Codes used / perplexity over {tokens:,} tokens / distortion on held-out images.",
            "",
        ]
        lines += [
            "| start | learning rate of W | "
            + " | ".join(f"step {step}" for step in steps)
            + " | norm of W, first to last |"
        ]
        lines += ["| --- | --- |" + " --- |" * (len(steps) + 1)]
        for key, result in rows.items():
            _, name, multiplier = key.split("/")
            cells = [
                f"{x['codebook_utilization']:.1%} / {x['codebook_perplexity']:,.0f} / {x['distortion']:.3f}"
                for x in result["history"]
            ]
            norms = [x["norm_of_W"] for x in result["history"]]
            lines.append(
                f"| {name} | x {multiplier} | " + " | ".join(cells) + f" | {norms[0]:.1f} to {norms[-1]:.1f} |"
            )
    titles = {
        "stage1": "Stage 1, encoder frozen",
        "moving": "The pretrained encoder trained too",
        "joint": "A small ViT from random weights, trained jointly",
    }
    for part, title in titles.items():
        rows = {key: result for key, result in results.items() if key.startswith(part + "/")}
        if not rows:
            continue
        lines += ["", f"### {title}", ""]
        lines += [
            "| codes | codebook | steps | latest tokens: codes used (tokens per code) | perplexity "
            "| all crops: codes used, least of all counts (tokens per code) | perplexity, least "
            "| held-out: distortion | PSNR | LPIPS |",
            "| ---: | --- |" + " ---: |" * 8,
        ]
        for key, result in rows.items():
            _, codes, name = key.split("/")
            last, codes = result["history"][-1], int(codes)
            cells = [f"{codes:,}", name, last["step"]]
            cells += [f"{last['codebook_utilization']:.1%} ({last['codebook_tokens'] / codes:.0f})"]
            cells += [f"{last['codebook_perplexity']:,.0f}"]
            counted = [entry["all_crops"] for entry in result["history"] if "all_crops" in entry]
            if counted:
                used = min(entry["codebook_utilization"] for entry in counted)
                cells.append(f"{used:.1%} ({counted[0]['codebook_tokens'] / codes:.0f})")
                cells.append(f"{min(entry['codebook_perplexity'] for entry in counted):,.0f}")
            else:
                cells += ["-", "-"]
            cells += [f"{last['distortion']:.3f}", f"{last['psnr']:.2f}"]
            cells += ["-" if last["lpips"] is None else f"{last['lpips']:.3f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    text = "\n".join(lines) + "\n"
    write_whole(output / "results.md", lambda path: path.write_text(text))
    write_whole(output / "results.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    print(text)
    plot({key: r for key, r in results.items() if key.startswith("stage1/")}, output / "curves.png")
    pictures(results, crops, output)


def plot(results: dict[str, dict], path: Path) -> None:
    """Usage and PSNR over steps, a column for each number of codes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({int(key.split("/")[1]) for key in results})
    if not sizes:
        return
    figure, axes = pyplot.subplots(2, len(sizes), figsize=(4 * len(sizes), 6), layout="constrained", squeeze=False)
    for key, result in results.items():
        _, codes, name = key.split("/")
        column, history = sizes.index(int(codes)), result["history"]
        used = [(x["step"], 100 * x["codebook_utilization"]) for x in history if "codebook_utilization" in x]
        axes[0, column].plot(*zip(*used), "o-", label=name)
        axes[1, column].plot([x["step"] for x in history], [x["psnr"] for x in history], "o-", label=name)
        axes[0, column].set(title=f"{int(codes):,} codes", ylim=(-3, 103))
        axes[1, column].set(xlabel="step")
    axes[0, 0].set(ylabel="codes used, %")
    axes[1, 0].set(ylabel="PSNR of held-out images, dB")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(3, len(handles[0])))
    write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=110, format="png"))
    print(f"Curves: {path}")


def pictures(results: dict[str, dict], crops: Crops, output: Path) -> None:
    """Held-out images, the same for every run, originals in the first row."""
    names = [key for key in results if not key.startswith("quantizer/")]
    if not names:
        return
    chosen = torch.linspace(0, len(crops.held_out[0]) - 1, 12).long()
    rows = [crops.held_out[0][chosen]]
    rows += [load_file(output / key / "reconstructions.safetensors")["pixels"][chosen] / 255 for key in names]
    save_rows(rows, output / "pictures.png", columns=12)
    print(f"Pictures: {output / 'pictures.png'}; rows from the top: originals, " + ", ".join(names))


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--encoder", required=True, help="A pretrained vision encoder: folder or hub repository.")
    parser.add_argument("--data", required=True, nargs="+", help="Folders of images.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/collapse"), help="Default: runs/collapse.")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "collapse.json", help="Settings.")
    parts = ["quantizer", "joint", "moving", "stage1"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts, help="Default: all.")
    parser.add_argument("--codes", nargs="+", help="Only these numbers of codes, e.g. 1024 16384.")
    args = parser.parse_args()
    settings = read_fields(args.config)
    keep_apart({"settings": settings, "encoder": args.encoder, "data": args.data}, args.output_dir / "inputs.json")

    torch.manual_seed(0)
    with loading(args.encoder):
        model = VQRAEModel.from_encoder_pretrained(
            args.encoder, image_size=settings["image_size"], codebook_size=1, **settings["decoder"]
        ).eval()
    crops = Crops(settings, model, args.data, args.output_dir / "crops")
    crops.encoder = args.encoder
    del model

    planned = {}
    if "quantizer" in args.parts:
        starts = ("SimVQ, Gaussian", "SimVQ, Gaussian, W and b matched", "SimVQ, drawn latents", "SimVQ, k-means")
        for name in starts:
            for multiplier in (1, 10):
                planned[f"quantizer/{name}/{multiplier:g}"] = (quantizer_run, (name, multiplier, settings, crops))
    for part in ("joint", "moving", "stage1"):
        for codes in settings[part] if part in args.parts else ():
            for name in (
                (*ARMS, *settings[part][codes].get("more", ())) if not args.codes or codes in args.codes else ()
            ):
                key = f"{part}/{codes}/{name}"
                planned[key] = (train_run, (part, name, int(codes), settings, crops, args.output_dir / key))

    results = {}
    for number, (key, (function, arguments)) in enumerate(planned.items(), 1):
        path = args.output_dir / key / "result.json"
        if path.exists():
            results[key] = json.loads(path.read_text())
            continue
        print(f"Run {number} of {len(planned)}: {key}", flush=True)
        results[key] = function(*arguments)
        write_whole(path, lambda unfinished, result=results[key]: unfinished.write_text(json.dumps(result)))
    report(results, crops, args.output_dir)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
