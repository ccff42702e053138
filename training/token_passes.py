"""Tokens of the training crops, computed once."""

import hashlib
import json
import os
from pathlib import Path

import datasets
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from eval.files import write_whole
from modeling_simvq import ImageTokenizer
from reading.images import image_name
from reading.models import tokenizer_hash
from reading.wording import counted
from training.data import TrainTransform, collate


def tokenize_crops(
    model: ImageTokenizer,
    dataset: datasets.Dataset,
    transform: TrainTransform,
    passes: int,
    folder: Path,
    batch_size: int,
    num_workers: int = 0,
) -> datasets.Dataset:
    """The dataset with the tokens of its crops as `image_tokens`, beside their `pixel_values`.

    Every image is cropped `passes` times, and every crop is tokenized, before this returns; a pass is a file of
    `folder`, and a pass that is there already, of the same weights, images and crops, is not computed again. Crops are
    not stored: the transform makes the crop of a pass from its number, and epoch `e` of training has those of pass
    `e % passes`.

    Args:
        model: its encoder, projection and quantizer must not change afterwards.
        dataset: with a column `image`, see `open_source`; all can be read (`readable_rows`).
        transform: of the dataset; is told where the tokens are.
        passes: number of crops of each image.
        folder: where the tokens are kept, two or four bytes each.
        batch_size: images a batch.
        num_workers: processes that read images.

    Raises:
        ValueError: an image that cannot be read.
    """
    what = f"{counted(len(dataset), 'image')}, {counted(passes, 'crop')} of each"
    print(f"Tokens of {what} ({folder}): those there are kept.", flush=True)
    plain = dataset.with_format(None)
    images = [_identity(record) for record in plain["image"]]
    crops = transform.image_size, transform.seed, transform.min_crop_area
    digest = hashlib.sha256(json.dumps([images, crops, tokenizer_hash(model)]).encode())
    made_from = {"made_from": digest.hexdigest()}
    dtype = torch.int16 if model.config.codebook_size <= 2**15 else torch.int32

    transform.strict = True  # no other image in the place of one: the tokens would be of this one
    if "row" in plain.column_names:  # of an earlier call, with other images perhaps
        plain = plain.remove_columns("row")
    plain = plain.add_column("row", list(range(len(plain))))
    rows = plain.with_transform(transform)
    generator = torch.Generator()  # the seed of workers is drawn from it, not from that of training
    loader = DataLoader(rows, batch_size, collate_fn=collate, num_workers=num_workers, generator=generator)
    was_training = model.training
    model.eval()
    tokens = []
    for number in range(passes):
        file = folder / f"pass-{number:04d}.safetensors"
        if file.is_file():
            with safe_open(file, "pt") as stored:
                if stored.metadata() == made_from:
                    tokens.append(stored.get_tensor("image_tokens"))
                    continue
        transform.set_epoch(number)
        with torch.inference_mode(), tqdm(total=len(rows), unit="image", desc=f"Tokens, {number + 1}/{passes}") as bar:
            parts = []
            for batch in loader:
                parts.append(model.get_image_tokens(batch["pixel_values"].to(model.device)).to(dtype).cpu())
                bar.update(len(parts[-1]))
        tokens.append(torch.cat(parts))
        content = {"image_tokens": tokens[-1]}
        write_whole(file, lambda path, content=content: save_file(content, path, metadata=made_from))
    model.train(was_training)
    model.quantizer.reset_codebook_usage()  # the log counts what is trained on
    transform.tokens = torch.stack(tokens)
    return rows


def _identity(record: dict) -> list:
    """What tells that a `datasets.Image(decode=False)` record is still the same image."""
    status = os.stat(record["path"]) if record["path"] and os.path.isfile(record["path"]) else None
    return [image_name(record), *((status.st_size, status.st_mtime_ns) if status else ())]
