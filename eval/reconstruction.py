#!/usr/bin/env python
"""Measures how well a tokenizer reconstructs images: rFID, LPIPS, PSNR, SSIM, and how it uses its codebook.

    python eval/reconstruction.py --model_name_or_path runs/quickstart --data my_images --output_dir results

Writes results.json (every setting that matters beside the numbers), results.md (a table) and pictures.png (the best,
median and worst images by PSNR, originals above reconstructions).

Protocol: shorter side resized to image_size (antialiased, with the filter of the model's image processor: bicubic, and
bilinear for the SimVQ paper's tokenizers), centre crop, the model in --dtype, reconstructions clamped and rounded to 8
bits; PSNR and SSIM averaged over images; LPIPS of both on [-1, 1]; rFID against the same originals with torchmetrics'
FrechetInceptionDistance (InceptionV3 of torch-fidelity, its resize antialiased as torchmetrics does by default). Few
images give a large and noisy rFID: publish it on 50,000.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchmetrics
import transformers
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.image_utils import PILImageResampling


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python eval/reconstruction.py` from a clone

from eval.files import write_whole  # noqa: E402
from eval.images import decode_image, load_images  # noqa: E402
from eval.metrics import CodebookUsage, pixel_metrics, to_uint8  # noqa: E402
from eval.pictures import save_rows  # noqa: E402
from image_processing_simvq import VQRAEImageProcessor  # noqa: E402
from modeling_simvq import VQRAEModel  # noqa: E402
from modeling_simvq_gan import SimVQGANModel  # noqa: E402


for model_class in (VQRAEModel, SimVQGANModel):
    AutoConfig.register(model_class.config_class.model_type, model_class.config_class)
    AutoModel.register(model_class.config_class, model_class)
    AutoImageProcessor.register(model_class.config_class, fast_image_processor_class=VQRAEImageProcessor)


class Collate:
    """Records with encoded images -> (B, 3, H, W) pixels."""

    def __init__(self, processor) -> None:
        self.processor = processor

    def __call__(self, records: list[dict]) -> torch.Tensor:
        images = [decode_image(record["image"]) for record in records]
        return self.processor(images, return_tensors="pt").pixel_values


NETWORK_METRICS = ("rfid", "lpips_alex", "lpips_vgg")


def build_network_metrics(names: list[str], inception_weights: str | None, device: torch.device) -> tuple[dict, dict]:
    """rFID and LPIPS metrics whose weights can be had, and for the others the reason why not.

    Args:
        names: which of `NETWORK_METRICS` are wanted.
        inception_weights: a local file, or `None` to take torch-fidelity's from its cache or the net.
        device: where they run.
    """
    builders = {
        "rfid": lambda: FrechetInceptionDistance(
            normalize=False, feature_extractor_weights_path=inception_weights
        ).set_dtype(torch.float64),
        "lpips_alex": lambda: LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True),
        "lpips_vgg": lambda: LearnedPerceptualImagePatchSimilarity(net_type="vgg", normalize=True),
    }
    hints = {
        "rfid": "pass --inception_weights pt_inception-2015-12-05-6726825d.pth (releases of toshas/torch-fidelity)",
        "lpips_alex": "put torchvision's alexnet-owt-7be5be79.pth into $TORCH_HOME/hub/checkpoints",
        "lpips_vgg": "put torchvision's vgg16-397923af.pth into $TORCH_HOME/hub/checkpoints",
    }
    metrics, reasons = {}, {name: "not asked for" for name in NETWORK_METRICS if name not in names}
    for name in names:
        print(f"Loading the weights of {name} (downloaded if they are not cached).", flush=True)
        try:
            metrics[name] = builders[name]().to(device)
        except (OSError, RuntimeError, ModuleNotFoundError) as error:  # URLError is an OSError
            reasons[name] = f"weights not available ({error}); {hints[name]}"
            print(f"{name} is left out: {reasons[name]}", flush=True)
    return metrics, reasons


def evaluate(model, loader: DataLoader, network_metrics: dict, reference=None) -> tuple[dict, list[float]]:
    """One pass over the images in bounded memory. Returns the metrics, and each image's PSNR in dB.

    Args:
        model: a tokenizer in eval mode with the methods and outputs of [`ImageTokenizer`].
        loader: batches of (B, 3, H, W) pixels in [0, 1].
        network_metrics: as `build_network_metrics` returns.
        reference: a tokenizer whose continuous features are the original ones: `feature_cosine` is the cosine
            similarity to them, averaged over tokens.
    """
    device = model.device
    pixels, usage = pixel_metrics().to(device), CodebookUsage(model.config.codebook_size).to(device)
    psnrs, cosine = [], MeanMetric().to(device)
    with torch.inference_mode():
        for originals in tqdm(loader, desc="Evaluating", unit="batch"):
            output = model(originals.to(device), return_loss=False)
            real, fake = to_uint8(originals.to(device)), to_uint8(output.decoded_pixel_values)
            real_unit, fake_unit = real / 255, fake / 255
            pixels.update(fake_unit, real_unit)
            psnrs += (-10 * (fake_unit - real_unit).square().mean((1, 2, 3)).clamp_min(1e-10).log10()).tolist()
            usage.update(output.image_tokens)
            if reference is not None:
                features = reference.get_image_features(originals.to(device))
                cosine.update(F.cosine_similarity(output.last_hidden_state.float(), features.float(), dim=-1))
            for name, metric in network_metrics.items():
                if name == "rfid":
                    metric.update(real, real=True), metric.update(fake, real=False)
                else:
                    metric.update(fake_unit, real_unit)
    values = {name: value.item() for name, value in pixels.compute().items()} | usage.compute()
    for name, metric in network_metrics.items():
        values[name] = metric.compute().item()
    if reference is not None:
        values["feature_cosine"] = cosine.compute().item()
    return values, psnrs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="A tokenizer: folder or hub repository.")
    parser.add_argument("--revision", help="Branch, tag or commit of a hub repository.")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="Run the modeling code that comes with a foreign checkpoint."
    )
    parser.add_argument(
        "--data", required=True, help="A folder of images, a .txt file that lists images, or a dataset of the hub."
    )
    parser.add_argument("--split", default="validation", help="Split of a hub dataset (default: validation).")
    parser.add_argument("--dataset_config_name", help="Configuration of a hub dataset.")
    parser.add_argument("--image_column", default="image", help="Column of a hub dataset (default: image).")
    parser.add_argument("--max_samples", type=int, help="Evaluate on that many images at most.")
    parser.add_argument("--output_dir", required=True, help="Where the results go.")
    parser.add_argument("--batch_size", type=int, default=32, help="Images at a time (default: 32).")
    parser.add_argument("--num_workers", type=int, default=0, help="Processes that load images (default: 0).")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="Of the model.")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Default: cuda where there is one."
    )
    parser.add_argument(
        "--network_metrics",
        nargs="*",
        default=list(NETWORK_METRICS),
        choices=NETWORK_METRICS,
        help="Metrics that need pretrained networks, hundreds of MB to download once (default: all). Nothing behind "
        "the flag: none.",
    )
    parser.add_argument(
        "--reference_model",
        help="A tokenizer with the original encoder, such as that of stage 1: feature_cosine is the cosine similarity "
        "of the continuous features to its.",
    )
    parser.add_argument("--inception_weights", help="Local file with torch-fidelity's Inception weights, for rFID.")
    args = parser.parse_args()

    device = torch.device(args.device)
    load = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    model = AutoModel.from_pretrained(args.model_name_or_path, dtype=getattr(torch, args.dtype), **load)
    model.to(device).eval()
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, **load)
    data = load_images(args.data, args.split, args.dataset_config_name, args.image_column)
    if args.max_samples:
        data = data.select(range(min(len(data), args.max_samples)))
    collate = Collate(processor)
    loader = DataLoader(data, args.batch_size, num_workers=args.num_workers, collate_fn=collate)
    network_metrics, reasons = build_network_metrics(args.network_metrics, args.inception_weights, device)

    start = time.time()
    reference = None
    if args.reference_model:
        reference = AutoModel.from_pretrained(args.reference_model, trust_remote_code=args.trust_remote_code)
        reference.to(device).eval()
    values, psnrs = evaluate(model, loader, network_metrics, reference)
    names = [*NETWORK_METRICS, "psnr", "ssim"]
    names += ["codebook_utilization", "codebook_perplexity", "codebook_tokens"]
    names += ["feature_cosine"] if reference is not None else []
    finite = {name: values.get(name) for name in names}
    finite = {name: value if value is None or abs(value) != float("inf") else None for name, value in finite.items()}
    if values["psnr"] == float("inf"):
        reasons["psnr"] = "infinite: every reconstruction equals its original"
    result = {
        "metrics": finite,
        "not_computed": reasons,
        "num_images": len(data),
        "settings": {
            "model": args.model_name_or_path,
            "revision": args.revision,
            "reference_model": args.reference_model,
            "codebook_size": model.config.codebook_size,
            "data": args.data,
            "split": None if Path(args.data).exists() else args.split,
            "size": dict(processor.size),
            "crop_size": dict(processor.crop_size) if processor.crop_size else None,
            "resample": f"{PILImageResampling(processor.resample).name.lower()}, antialiased",
            "dtype": args.dtype,
            "device": args.device,
            "rounding": "clamped and rounded to uint8",
            "psnr": "mean over images, data range 1",
            "ssim": "torchmetrics, Gaussian window 11 px, sigma 1.5",
            "rfid": "torchmetrics, 2048 features, torch-fidelity Inception, antialias=True",
            "rfid_reference": "the same originals, resized and cropped alike",
            "inception_weights": args.inception_weights,
        },
        "versions": {
            "torch": torch.__version__,
            "torchmetrics": torchmetrics.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "seconds": round(time.time() - start, 1),
    }
    output = Path(args.output_dir)
    write_whole(output / "results.json", lambda file: file.write_text(json.dumps(result, indent=2) + "\n"))
    table = ["| metric | value |", "| --- | --- |"]
    table += [f"| {name} | {'not computed' if value is None else f'{value:.4g}'} |" for name, value in finite.items()]
    table += [f"| images | {len(data)} |"]
    write_whole(output / "results.md", lambda file: file.write_text("\n".join(table) + "\n"))

    order = sorted(range(len(psnrs)), key=lambda i: -psnrs[i])
    count = min(8, len(order))
    middle = (len(order) - count) // 2
    chosen = order[:count] + order[middle : middle + count] + order[-count:]
    pairs = []
    with torch.inference_mode():
        for start_row in range(0, len(chosen), count):
            pixels = collate([data[i] for i in chosen[start_row : start_row + count]]).to(device)
            pairs.append((pixels, model(pixels, return_loss=False).decoded_pixel_values))
    save_rows([torch.cat(images) for images in zip(*pairs)], output / "pictures.png", columns=count)
    print("\n".join(table))
    print(f"{output / 'results.json'}\n{output / 'results.md'}\n{output / 'pictures.png'}: best, median, worst by PSNR")


if __name__ == "__main__":
    main()
