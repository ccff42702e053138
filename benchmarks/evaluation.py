#!/usr/bin/env python
"""What an evaluation costs, beside the SimVQ reference's loop.

    pip install ".[benchmark]" && python -m benchmarks.evaluation --data PHOTOS

1. Everything that is not a network: reading, cropping, counting codes, PSNR, SSIM and pictures, on 1,000 images with a
   tiny model, under the protocol `simvq-128`; and the same numbers from the reference's evaluation.py written out
   plainly (one image, one code at a time, PSNR of the whole batch once for each of its images, two PNG files of each
   image). The time of the model is taken off both. Both give the same numbers, which is checked.
2. Memory after more and more images of 256 px.
3. The whole pass under the protocol `default`: the time of each network inside it, and what is beyond them. Networks
   have random weights.

Images are those of --data, again and again until there are enough.
"""

import argparse
import contextlib
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as T
import torchvision.utils as vutils
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torchmetrics.functional.image.lpips import _NoTrainLpips
from tqdm import tqdm

from configuration_simvq import VQRAEConfig
from eval.commands import ends_in_one_line
from eval.crops import CroppedImages
from eval.evaluation import Evaluation, Networks
from eval.protocol import Protocol
from eval.reconstruction import ModelReconstruction, evaluate
from eval.results import write_results
from eval.rfid.rfid import InceptionV3
from modeling_simvq import VQRAEModel
from reading.files import dataset_of_files, find_images


ROOT = Path(__file__).resolve().parents[1]


class Timed:
    """A callable whose time is summed up."""

    def __init__(self, call) -> None:
        self.call, self.seconds = call, 0.0

    def __call__(self, *args, **kwargs):
        start = time.perf_counter()
        result = self.call(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return result


def model_of(width: int, layers: int, image_size: int, patch: int) -> VQRAEModel:
    torch.manual_seed(0)
    encoder = {"model_type": "dinov2", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    encoder |= {"patch_size": patch, "image_size": image_size}
    config = VQRAEConfig(
        encoder_config=encoder, image_size=image_size, decoder_patch_size=patch, codebook_size=1024, codebook_dim=8
    )
    return VQRAEModel(config).eval()


def references_way(files: list[Path], reconstruct, folder: Path, batch_size: int = 64) -> dict[str, float]:
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
        pixels, tokens, _ = reconstruct((images + 1) / 2)
        for token in tokens.flatten():
            usage[token.item()] += 1
        fakes = ((pixels * 2 - 1).clamp(-1, 1) + 1) / 2
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


def ours(images: CroppedImages, reconstruct, networks: Networks, folder: Path, batch_size: int) -> dict[str, float]:
    """The pass of eval/reconstruction.py with everything that it writes."""
    evaluation = Evaluation(images.protocol, networks, 1024)
    device = torch.device("cpu")
    evaluate(evaluation, images, reconstruct, batch_size, 0, device, folder / "progress.pt", "benchmark")
    metrics, reasons, warnings = evaluation.compute()
    result = {"protocol": vars(images.protocol), "image_size": images.size, "metrics": metrics, "warnings": warnings}
    result |= {"not_computed": reasons, "num_images": len(evaluation.index), "skipped_images": [], "num_not_finite": 0}
    with contextlib.redirect_stdout(None):
        write_results(folder, result, evaluation, images, reconstruct, device)
    return metrics


def without_networks(files: list[Path]) -> None:
    model, protocol = model_of(16, 1, 128, 8), Protocol.load("simvq-128")
    seconds, numbers = {}, {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name in ("reference", "ours"):
            reconstruct = Timed(ModelReconstruction(model, semantic_agreement=False))
            start = time.perf_counter()
            if name == "reference":
                numbers[name] = references_way(files, reconstruct, Path(folder) / name)
            else:
                images = CroppedImages(dataset_of_files(files), protocol, 128)
                numbers[name] = ours(images, reconstruct, Networks(), Path(folder) / name, protocol.batch_size)
            seconds[name] = time.perf_counter() - start - reconstruct.seconds
    for metric, value in numbers["reference"].items():
        difference = abs(numbers["ours"][metric] - value)
        assert difference < 1e-4 * value, f"{metric}: {value} and {numbers['ours'][metric]}"
    print(
        f"\n{len(files):,} images, 128 px, protocol simvq-128, without the networks (the model's time is taken off)\n"
    )
    print("| | seconds | PSNR | SSIM | codes used |\n| --- | ---: | ---: | ---: | ---: |")
    for name, values in numbers.items():
        row = f"{values['psnr']:.4f} | {values['ssim']:.5f} | {values['codebook_utilization']:.4f}"
        print(f"| {name} | {seconds[name]:.2f} | {row} |")
    print(f"\nreference / ours: {seconds['reference'] / seconds['ours']:.1f}\n")


def whole_pass(files: list[Path], size: int, batch_size: int) -> None:
    protocol, model = Protocol.load("default"), model_of(384, 12, size, 16)
    networks = Networks({"rfid": random_inception()})
    for net in ("alex", "vgg"):
        networks.lpips[f"lpips_{net}"] = _NoTrainLpips(net=net, pnet_rand=True)  # the time is that of the real ones
    parts = {"model (encoder twice, for the semantic agreement)": ModelReconstruction(model, True)}
    parts |= {"Inception, both images": networks.frechet["rfid"]}
    parts |= {f"LPIPS, {net}": networks.lpips[f"lpips_{net}"] for net in ("alex", "vgg")}
    timed = {name: Timed(part) for name, part in parts.items()}
    networks.frechet["rfid"] = timed["Inception, both images"]
    networks.lpips = {f"lpips_{net}": timed[f"LPIPS, {net}"] for net in ("alex", "vgg")}
    images = CroppedImages(dataset_of_files(files), protocol, size)
    loading = Timed(images.__getitem__)
    images.__class__ = type("Timed", (CroppedImages,), {"__getitem__": lambda self, index: loading(index)})
    reconstruct = next(iter(timed.values()))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        ours(images, reconstruct, networks, Path(folder), batch_size)
        total = time.perf_counter() - start
    own = sum(part.seconds for part in timed.values())
    print(f"\n{len(files):,} images, {size} px, protocol default, the whole pass with everything it writes\n")
    print("| part | seconds | share |\n| --- | ---: | ---: |")
    for name, part in timed.items():
        print(f"| {name} | {part.seconds:.2f} | {part.seconds / total:.1%} |")
    print(f"| reading and cropping | {loading.seconds:.2f} | {loading.seconds / total:.1%} |")
    rest = total - own - loading.seconds
    print(f"| PSNR, SSIM, MS-SSIM, counts, moments, distance, pictures, page | {rest:.2f} | {rest / total:.1%} |")
    print(f"| all | {total:.2f} | |\n\nthe whole pass / its networks: {total / own:.3f}\n")


def memory(files: list[Path], size: int, batch_size: int) -> None:
    """Peak memory of the process after more and more images, with 2,048 features of each."""
    torch.manual_seed(0)
    weights = torch.randn(3 * 16 * 16, 2048)

    def features(images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 16).flatten(1) @ weights

    print("\n| images | peak MB of the process |\n| ---: | ---: |")
    for count in (len(files) // 4, len(files) // 2, len(files)):
        images = CroppedImages(dataset_of_files(files[:count]), Protocol.load("default"), size)
        evaluation = Evaluation(images.protocol, Networks({"fd_random": features}), 1024)
        with tempfile.TemporaryDirectory() as folder:
            progress, device = Path(folder) / "progress.pt", torch.device("cpu")
            evaluate(evaluation, images, lambda x: (x, None, {}), batch_size, 0, device, progress, "benchmark")
        print(f"| {count:,} | {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024:,} |")


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="A folder of images.")
    parser.add_argument("--num_images", type=int, default=1000, help="Of the first two parts (default: 1000).")
    parser.add_argument("--num_images_whole", type=int, default=96, help="Of the last part (default: 96).")
    parser.add_argument("--image_size", type=int, default=256, help="Of the last two parts (default: 256).")
    parser.add_argument("--batch_size", type=int, default=32, help="Of the last two parts (default: 32).")
    args = parser.parse_args()
    files = find_images(args.data)

    def enough(count: int) -> list[Path]:
        return [files[i % len(files)] for i in range(count)]

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    without_networks(enough(args.num_images))
    memory(enough(args.num_images), args.image_size, args.batch_size)
    whole_pass(enough(args.num_images_whole), args.image_size, args.batch_size)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
