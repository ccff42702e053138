"""Tiny tokenizers, datasets of tokens and generators for the tests of generation/."""

import sys

import datasets
import torch
from conftest import tiny_config

from generation import train
from generation.provenance import Provenance
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from reading.models import tokenizer_hash


CLASSES = ["dots", "flat", "ramp", "stripes"]
TINY = '{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}'


def pictures(count: int = 40) -> tuple[torch.Tensor, list[int]]:
    """(count, 3, 32, 32) in [0, 1], of four classes in turn, all of one class alike but for some noise."""
    torch.manual_seed(0)
    x = torch.linspace(0, 1, 32).expand(32, 32)
    plain = [
        ((x * 4).floor() + (x.T * 4).floor()).remainder(2).expand(3, -1, -1) * torch.tensor([1, 0.2, 0]).view(3, 1, 1),
        torch.tensor([0.1, 0.3, 0.8]).view(3, 1, 1).expand(-1, 32, 32),
        torch.stack([x, x.T, 1 - x]),
        ((x * 4).floor() % 2).expand(3, -1, -1),
    ]
    labels = [i % 4 for i in range(count)]
    return torch.stack([(plain[label] + 0.02 * torch.randn(3, 32, 32)).clamp(0, 1) for label in labels]), labels


def make_tokenizer(folder) -> VQRAEModel:
    """16 codes, fitted to `pictures`, a grid of 4 x 4; saved."""
    torch.manual_seed(0)
    model = VQRAEModel(
        tiny_config(
            codebook_size=16,
            codebook_dim=16,
            codebook_init="kmeans",
            pixel_weight=2.0,
            encoder_layers=[1, 2],
            decoder_linear_path=1,
        )
    ).eval()
    model.initialize_codebook([pictures()[0]])
    model.save_pretrained(folder)
    VQRAEImageProcessor.for_image_size(32).save_pretrained(folder)
    return model


def write_tokens(folder, tokens: torch.Tensor, tokenizer=None, name="tokenizer", labels=None, texts=None, **fields):
    """A dataset of tokens (images, crops, h, w) with keys "0000", "0001", ...

    Args:
        tokenizer: which they are of; `None`: of one with 16 codes that nobody has.
        fields: of its provenance, to change.
    """
    images, crops, height, width = tokens.shape
    columns = {"key": [], "image_tokens": [], "height": [], "width": [], "crop": [], "flipped": []}
    for image in range(images):
        for crop in range(crops):
            values = f"{image:04d}", tokens[image, crop].flatten().tolist(), height, width, crop, False
            for column, value in zip(columns.values(), values):
                column.append(value)
    features = {"key": datasets.Value("string"), "image_tokens": datasets.List(datasets.Value("uint16"))}
    features |= {"height": datasets.Value("int32"), "width": datasets.Value("int32")}
    features |= {"crop": datasets.Value("int32"), "flipped": datasets.Value("bool")}
    if labels is not None:
        columns["label"] = [label for label in labels for _ in range(crops)]
        features["label"] = datasets.ClassLabel(names=CLASSES)
    if texts is not None:
        columns["text"] = [text for text in texts for _ in range(crops)]
        features["text"] = datasets.Value("string")
    folder.mkdir(parents=True)
    rows = datasets.Dataset.from_dict(columns, datasets.Features(features))
    rows.to_parquet(folder / "train-00000.parquet")
    known = {
        "model_name_or_path": str(name), "revision": None, "codebook_size": 16, "patch_size": 8, "image_size": 32,
        "tokenizer_hash": "0" * 64 if tokenizer is None else tokenizer_hash(tokenizer), "crops": crops,
        "ten_crop_ratio": None, "flip": False, "resample": 3, "dtype": "float32", "share_changed_by_dtype": 0.0,
        "batch_size": 8, "shard_size": 1000, "source": "nowhere", "split": "train", "source_hash": "", "versions": {},
        "max_samples": None, "label_names": CLASSES if labels is not None else None, "num_images": images,
        "num_unreadable": 0, "num_rows": images * crops,
    }  # fmt: skip
    Provenance(**known | fields).save(folder)
    return folder


def run_training(monkeypatch, *arguments) -> None:
    """`python -m generation.train`, in this process."""
    common = ["--model_config", TINY, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
    common += ["--save_strategy", "no", "--num_pictures", "0", "--per_device_train_batch_size", "8"]
    monkeypatch.setattr(sys, "argv", ["train.py", *common, *map(str, arguments)])
    train.main()
