#!/usr/bin/env python
"""Makes the reference statistics of an rFID: mean and covariance of the Inception features of a set of images.

    python -m eval.reference_statistics --data imagenet_val --protocol titok-256 --output_file imagenet_val_256.npz

The file (`mu`, `sigma`) is what pytorch-fid reads and writes as well, and what `eval/reconstruction.py
--reference_statistics` takes. Images are cropped as the protocol says.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from eval.crops import CroppedImages, collate_images
from eval.files import write_whole
from eval.networks import load_networks
from eval.protocol import Protocol, names
from eval.rfid.rfid import Moments
from reading.sources import load_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="A folder of images, a .txt file, or a dataset of the hub.")
    parser.add_argument("--split", default="validation", help="Split of a hub dataset (default: validation).")
    parser.add_argument("--dataset_config_name", help="Configuration of a hub dataset.")
    parser.add_argument("--image_column", default="image", help="Column of a hub dataset (default: image).")
    parser.add_argument("--protocol", default="default", help=f"One of {', '.join(names())}, or a .json file.")
    parser.add_argument("--image_size", type=int, help="Side of the crops, where the protocol does not say.")
    parser.add_argument("--inception_weights", help="Local file with torch-fidelity's Inception weights.")
    parser.add_argument("--batch_size", type=int, default=32, help="Images at a time (default: 32).")
    parser.add_argument("--num_workers", type=int, default=0, help="Processes that load images (default: 0).")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Default: cuda, cpu.")
    parser.add_argument("--output_file", required=True, type=Path, help="The .npz file to write.")
    args = parser.parse_args()
    protocol, device = Protocol.load(args.protocol), torch.device(args.device)
    if protocol.inception is None:
        parser.error(f"protocol {protocol.name} has no rFID")
    networks, reasons, _ = load_networks(protocol, device, names=["rfid"], inception_weights=args.inception_weights)
    if "rfid" not in networks.frechet:
        sys.exit(reasons["rfid"])
    network = networks.frechet["rfid"]
    moments = Moments(network.num_features, device)
    data = load_images(args.data, args.split, args.dataset_config_name, args.image_column)
    images = CroppedImages(data, protocol, protocol.image_size or args.image_size)
    loader = DataLoader(images, args.batch_size, num_workers=args.num_workers, collate_fn=collate_images)
    with torch.inference_mode():
        for batch in tqdm(loader, desc="Features", unit="batch"):
            for _, error in batch["skipped"]:
                tqdm.write(f"Left out: {error}")
            if batch["index"]:
                originals = batch["original"].to(device)
                moments.update(network(originals / 255 if protocol.inception == "pytorch-fid" else originals))
    if moments.count < 2:
        sys.exit(f"{int(moments.count)} images have no covariance.")
    mean, covariance = (tensor.cpu().numpy() for tensor in moments.compute())

    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, mu=mean, sigma=covariance)

    write_whole(args.output_file, save)
    print(f"{args.output_file}: statistics of {int(moments.count)} images.")


if __name__ == "__main__":
    main()
