#!/usr/bin/env python
"""Makes the reference statistics of an rFID: mean and covariance of the Inception features of a set of images.

    python -m eval.reference_statistics --data imagenet_val --protocol titok-256 --output_file imagenet_val_256.npz

The file (`mu`, `sigma`) is what pytorch-fid reads and writes as well, and what `eval/reconstruction.py
--reference_statistics` takes. Images are cropped as the protocol says.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.batches import load_batches
from eval.commands import CommandParser, ends_in_one_line
from eval.crops import CroppedImages
from eval.files import write_whole
from eval.networks import load_networks
from eval.options import add_source_options, present_device, whole_number
from eval.protocol import Protocol, names
from eval.rfid.rfid import Moments
from reading.sources import load_images
from reading.wording import counted


def main() -> None:
    parser = CommandParser(__doc__)
    add_source_options(parser, split="validation", required=True)
    parser.add_argument("--protocol", default="default", help=f"One of {', '.join(names())}, or a .json file.")
    parser.add_argument("--image_size", type=whole_number(), help="Side of the crops, where the protocol does not say.")
    parser.add_argument("--inception_weights", help="Local file with torch-fidelity's Inception weights.")
    parser.add_argument("--batch_size", type=whole_number(), default=32, help="Images at a time (default: 32).")
    parser.add_argument(
        "--num_workers", type=whole_number(0), default=0, help="Processes that load images (default: 0)."
    )
    parser.add_argument(
        "--device",
        type=present_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Default: cuda where there is one.",
    )
    parser.add_argument("--output_file", required=True, type=Path, help="The .npz file to write.")
    args = parser.parse_args()
    protocol, device = Protocol.load(args.protocol), args.device
    if protocol.inception is None:
        parser.error(f"protocol {protocol.name} has no rFID")
    with ends_in_one_line(ValueError):  # such as a split that it does not have
        options = {"config_name": args.dataset_config_name, "image_column": args.image_column}
        data = load_images(args.data, args.split, **options)
    networks, reasons, _ = load_networks(protocol, device, names=["rfid"], inception_weights=args.inception_weights)
    if "rfid" not in networks.frechet:
        raise ValueError(f"No network for rFID: {reasons['rfid']}")
    network = networks.frechet["rfid"]
    moments = Moments(network.num_features, device)
    images = CroppedImages(data, protocol, protocol.image_size or args.image_size)
    numbers = torch.arange(len(images)).split(args.batch_size)
    loader = load_batches(images, [part.tolist() for part in numbers], args.num_workers)
    bar = tqdm(total=len(images), desc="Features", unit="image")
    with bar, torch.inference_mode():
        for part, batch in zip(numbers, loader):
            for _, error in batch["skipped"]:
                tqdm.write(f"Left out: {error}")
            if batch["index"]:
                originals = batch["original"].to(device)
                moments.update(network(originals / 255 if protocol.inception == "pytorch-fid" else originals))
            bar.update(len(part))
    if moments.count < 2:
        raise ValueError(f"{args.data} gave {counted(int(moments.count), 'image')}: no covariance: pass two or more.")
    mean, covariance = (tensor.cpu().numpy() for tensor in moments.compute())

    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, mu=mean, sigma=covariance)

    write_whole(args.output_file, save)
    print(f"{args.output_file}: statistics of {counted(int(moments.count), 'image')}.")


if __name__ == "__main__":
    with ends_in_one_line(smaller="--batch_size or --image_size"):
        main()
