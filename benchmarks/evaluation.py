#!/usr/bin/env python
"""What an evaluation costs, beside the SimVQ reference's loop.

    pip install ".[benchmark]" && python -m benchmarks.evaluation --data PHOTOS
    python -m benchmarks.evaluation --data PHOTOS --device cuda --num_workers 8 --num_images_whole 2048 --profile

1. Everything that is not a network: reading, cropping, counting codes, PSNR, SSIM and pictures, on 1,000 images with a
   tiny model, under the protocol `simvq-128`; and the same numbers from the reference's evaluation.py written out
   plainly (one image, one code at a time, PSNR of the whole batch once for each of its images, two PNG files of each
   image). The time of the model is taken off both. Both give the same numbers, which is checked.
2. Memory after more and more images of 256 px.
3. The whole pass under the protocol `default`: the time of each network inside it, that in which it waits for images,
   and what is beyond them. Networks have random weights. With --profile, one more pass under torch's profiler says how
   much of it is neither matrix products nor convolutions.

Images are those of --data, again and again until there are enough.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision.transforms as T
import torchvision.utils as vutils
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torchmetrics.functional.image.lpips import _NoTrainLpips
from tqdm import tqdm

from benchmarks.measuring import name_of, now, peak_megabytes, profiled
from configuration_simvq import VQRAEConfig
from eval import reconstruction
from eval.batches import load_batches
from eval.commands import CommandParser, ends_in_one_line
from eval.crops import CroppedImages
from eval.evaluation import Evaluation, Networks
from eval.options import present_device, whole_number
from eval.protocol import Protocol
from eval.reconstruction import ModelReconstruction, evaluate
from eval.results import write_results
from eval.rfid.rfid import InceptionV3
from modeling_simvq import VQRAEModel
from reading.files import dataset_of_files, find_images


parser = CommandParser(__doc__)
parser.add_argument("--data", required=True, help="A folder of images.")
parser.add_argument("--num_images", type=whole_number(4), default=1000, help="Of the first two parts (default: 1000).")
parser.add_argument("--num_images_whole", type=whole_number(), default=96, help="Of the last part (default: 96).")
parser.add_argument("--image_size", type=whole_number(), default=256, help="Of the last two parts (default: 256).")
parser.add_argument("--batch_size", type=whole_number(), default=32, help="Of the last two parts (default: 32).")
parser.add_argument("--num_workers", type=whole_number(0), default=0, help="That decode ours's images (default: 0).")
parser.add_argument("--device", type=present_device, default="cpu", help="cpu (default) or cuda.")
parser.add_argument("--profile", action="store_true", help="Also the whole pass under the profiler.")


class Timed:
    """A callable whose time is summed up."""

    def __init__(self, call, device: torch.device) -> None:
        self.call, self.device, self.seconds = call, device, 0.0

    def __call__(self, *args, **kwargs):
        start = now(self.device)
        result = self.call(*args, **kwargs)
        self.seconds += now(self.device) - start
        return result


def model_of(width: int, layers: int, image_size: int, patch: int) -> VQRAEModel:
    torch.manual_seed(0)
    encoder = {"model_type": "dinov2", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    encoder |= {"patch_size": patch, "image_size": image_size}
    config = VQRAEConfig(
        encoder_config=encoder, image_size=image_size, decoder_patch_size=patch, codebook_size=1024, codebook_dim=8
    )
    return VQRAEModel(config).eval()


def references_way(
    files: list[Path], reconstruct, folder: Path, device: torch.device, batch_size: int = 64
) -> dict[str, float]:
    """The parts of evaluation.py (github.com/youngsheen/SimVQ) that are no networks, in our words."""
    crop = T.Compose([T.Resize(128), T.CenterCrop((128, 128))])
    usage = dict.fromkeys(range(1024), 0)
    psnr = ssim = batches = number = 0
    for kind in ("source", "recons"):
        (folder / kind).mkdir(parents=True)
    for start in tqdm(range(0, len(files), batch_size), desc="The reference's way", unit="batch"):
        arrays = []
        for file in files[start : start + batch_size]:
            array = np.array(crop(Image.open(file).convert("RGB")))
            arrays.append((array / 127.5 - 1.0).astype(np.float32))
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        pixels, tokens, _ = reconstruct(((images + 1) / 2).to(device))
        for token in tokens.flatten():
            usage[token.item()] += 1
        fakes = ((pixels.cpu() * 2 - 1).clamp(-1, 1) + 1) / 2
        images = (images + 1) / 2
        real, fake = ((x * 255.0).permute(0, 2, 3, 1).to(torch.uint8).numpy() for x in (images, fakes))
        real, fake = (x.astype(np.float32) / 255.0 for x in (real, fake))
        psnrs = ssims = 0
        for i in range(len(real)):
            ssims += structural_similarity(fake[i], real[i], data_range=1.0, channel_axis=-1)
            psnrs += peak_signal_noise_ratio(real, fake, data_range=1.0)
        psnr, ssim, batches = psnr + psnrs / len(real), ssim + ssims / len(real), batches + 1
        for i in range(len(real)):
            vutils.save_image(images[i], folder / "source" / f"{number}.png", normalize=True)
            vutils.save_image(fakes[i], folder / "recons" / f"{number}.png", normalize=True)
            number += 1
    used = sum(count > 0 for count in usage.values())
    return {"psnr": psnr / batches, "ssim": ssim / batches, "codebook_utilization": used / len(usage)}


def ours(
    images: CroppedImages, reconstruct, networks: Networks, folder: Path, batch_size: int, workers: int,
    device: torch.device,
) -> dict[str, float]:  # fmt: skip
    """The pass of eval/reconstruction.py with everything that it writes."""
    evaluation = Evaluation(images.protocol, networks, 1024)
    evaluate(evaluation, images, reconstruct, batch_size, workers, device, folder / "progress.pt", "benchmark")
    metrics, reasons, warnings = evaluation.compute()
    result = {"protocol": vars(images.protocol), "image_size": images.size, "metrics": metrics, "warnings": warnings}
    result |= {"not_computed": reasons, "num_images": len(evaluation.index), "skipped_images": [], "num_not_finite": 0}
    with contextlib.redirect_stdout(None):
        write_results(folder, result, evaluation, images, reconstruct, device)
    return metrics


def without_networks(files: list[Path], workers: int, device: torch.device) -> None:
    model, protocol = model_of(16, 1, 128, 8).to(device), Protocol.load("simvq-128")
    seconds, numbers = {}, {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name in ("reference", "ours"):
            reconstruct = Timed(ModelReconstruction(model, semantic_agreement=False), device)
            start = now(device)
            if name == "reference":
                numbers[name] = references_way(files, reconstruct, Path(folder) / name, device)
            else:
                images = CroppedImages(dataset_of_files(files), protocol, 128)
                to = Path(folder) / name
                numbers[name] = ours(images, reconstruct, Networks(), to, protocol.batch_size, workers, device)
            seconds[name] = now(device) - start - reconstruct.seconds
    for metric, value in numbers["reference"].items():
        difference = abs(numbers["ours"][metric] - value)
        assert difference < 1e-4 * value, f"{metric}: {value} and {numbers['ours'][metric]}"
    print(
        f"\n{len(files):,} images, 128 px, protocol simvq-128, without the networks (the model's time is taken off)\n"
    )
    print("| | seconds | images a second | PSNR | SSIM | codes used |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, values in numbers.items():
        row = f"{values['psnr']:.4f} | {values['ssim']:.5f} | {values['codebook_utilization']:.4f}"
        print(f"| {name} | {seconds[name]:.2f} | {len(files) / seconds[name]:.0f} | {row} |")
    print(f"\nreference / ours: {seconds['reference'] / seconds['ours']:.1f}\n")


def networks_of_default(device: torch.device) -> Networks:
    """Those of the protocol `default`, with random weights."""
    networks = Networks({"rfid": random_inception().to(device)})
    for net in ("alex", "vgg"):
        networks.lpips[f"lpips_{net}"] = _NoTrainLpips(net=net, pnet_rand=True).to(device)
    return networks


def whole_pass(files: list[Path], args: argparse.Namespace) -> None:
    device, size = args.device, args.image_size
    model, networks = model_of(384, 12, size, 16).to(device), networks_of_default(device)
    parts = {"model (encoder twice, for the semantic agreement)": ModelReconstruction(model, True)}
    parts |= {"Inception, both images": networks.frechet["rfid"]}
    parts |= {f"LPIPS, {net}": networks.lpips[f"lpips_{net}"] for net in ("alex", "vgg")}
    parts |= {"waiting for images": next}
    timed = {name: Timed(part, device) for name, part in parts.items()}
    networks.frechet["rfid"] = timed["Inception, both images"]
    networks.lpips = {f"lpips_{net}": timed[f"LPIPS, {net}"] for net in ("alex", "vgg")}
    images = CroppedImages(dataset_of_files(files), Protocol.load("default"), size)
    reconstruct, waiting = next(iter(timed.values())), timed["waiting for images"]

    def watched(*arguments) -> Iterator[dict]:
        batches = load_batches(*arguments)
        while (batch := waiting(batches, None)) is not None:
            yield batch

    def everything() -> None:
        with tempfile.TemporaryDirectory() as folder:
            ours(images, reconstruct, networks, Path(folder), args.batch_size, args.num_workers, device)

    with mock.patch.object(reconstruction, "load_batches", watched):
        start = now(device)
        everything()
        total = now(device) - start
    own = sum(part.seconds for part in timed.values()) - waiting.seconds
    print(
        f"\n{len(files):,} images, {size} px, protocol default, the whole pass with everything it writes, "
        f"{args.num_workers} workers\n"
    )
    print("| part | seconds | share |\n| --- | ---: | ---: |")
    for name, part in timed.items():
        print(f"| {name} | {part.seconds:.2f} | {part.seconds / total:.1%} |")
    rest = total - own - waiting.seconds
    print(f"| PSNR, SSIM, MS-SSIM, counts, moments, distance, pictures, page | {rest:.2f} | {rest / total:.1%} |")
    print(f"| all | {total:.2f} | |\n\nthe whole pass / its networks: {total / own:.3f}")
    print(f"{len(files) / total:.1f} images a second, at most {peak_megabytes(device):,.0f} MB\n")
    if args.profile:
        profile = profiled(everything, device)
        print(f"{profile.table()}\n\nOutside matrix products, convolutions and attention: {profile.outside:.1%}")


def memory(files: list[Path], args: argparse.Namespace) -> None:
    """Peak memory after more and more images, with 2,048 features of each."""
    torch.manual_seed(0)
    device = args.device
    weights = torch.randn(3 * 16 * 16, 2048).to(device)

    def features(images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 16).flatten(1) @ weights

    what = "MB of the GPU's tensors" if device.type == "cuda" else "MB of the process"
    print(f"\n| images | peak {what} |\n| ---: | ---: |")
    for count in (len(files) // 4, len(files) // 2, len(files)):
        images = CroppedImages(dataset_of_files(files[:count]), Protocol.load("default"), args.image_size)
        evaluation = Evaluation(images.protocol, Networks({"fd_random": features}), 1024)
        with tempfile.TemporaryDirectory() as folder:
            to, workers = Path(folder) / "progress.pt", args.num_workers
            evaluate(evaluation, images, lambda x: (x, None, {}), args.batch_size, workers, device, to, "benchmark")
        print(f"| {count:,} | {peak_megabytes(device):,.0f} |")


def random_inception() -> InceptionV3:
    """FID's network with random weights: the time is that of the real ones."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    load = nn.Module.load_state_dict
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save({}, path)
        nn.Module.load_state_dict = lambda *args, **kwargs: None
        try:
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
        finally:
            nn.Module.load_state_dict = load
    return InceptionV3(network.state_dict())


def main() -> None:
    args = parser.parse_args()
    files = find_images(args.data)

    def enough(count: int) -> list[Path]:
        return [files[i % len(files)] for i in range(count)]

    print(f"torch {torch.__version__}, {name_of(args.device)}")
    without_networks(enough(args.num_images), args.num_workers, args.device)
    memory(enough(args.num_images), args)
    whole_pass(enough(args.num_images_whole), args)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
