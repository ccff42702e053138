#!/usr/bin/env python
"""What of an encoder's understanding its tokens keep: classes of images, told from features, latents and tokens.

    python -m eval.probe --model_name_or_path checkpoints/vqrae-dinov2-small --data FOLDER_WITH_CLASSES \\
        --output_dir results

FOLDER_WITH_CLASSES has a folder of images for each class; any other source with labels does as well (docs/data.md). Of
each image four vectors are made:

encoder features    mean of the continuous features
quantized features  the same, of what comes back from the codes (`quantized_last_hidden_state`)
quantized latents   mean of the codes themselves
bags of tokens      how often each code occurs, as square roots of shares

Each is judged by k nearest neighbours (cosine, standardised) and by logistic regression, both of scikit-learn, in five
folds that keep the shares of classes. Intervals are those of 1,000 bootstrap samples of the images (95 %); the baseline
always says the most frequent class. Writes probe.json, probe.md and probe.html.
"""

import html
import importlib.util
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import torch
from tqdm import tqdm

from eval.commands import CommandParser, ends_in_one_line
from eval.files import write_whole
from eval.networks import weights_hash
from eval.options import add_source_options, present_device, whole_number
from eval.results import library_versions
from image_processing_simvq import VQRAEImageProcessor
from reading.images import decode_image
from reading.models import load_pretrained, load_processor
from reading.sources import open_source
from reading.wording import counted, did_you_mean


NEIGHBOURS, FOLDS, RESAMPLES = 5, 5, 1000


def labelled_images(
    data: str, classes: list[str] | None = None, **options
) -> tuple[datasets.Dataset, np.ndarray, list[str]]:
    """Images in a column `image`, the number of the class of each, and the names of the classes, in the order of the
    numbers.

    Args:
        data: a source with labels, such as a folder with a folder for each class. Images without a label are left out.
        classes: some of its classes.
        options: of `open_source`.

    Raises:
        ValueError: fewer than two classes, a class that is not there, or one with fewer images than there are folds.
    """
    dataset = open_source(data, wanted=("image", "label"), **options)
    if "label" not in dataset.column_names:
        raise ValueError(
            f"{data} has no classes: put the images of each class into a sub-folder of their own, or name a column of "
            "labels (--label_column)."
        )
    feature, labels = dataset.features["label"], dataset["label"][:]
    there = getattr(feature, "names", None) or sorted(set(labels) - {None})  # names, or numbers where there are none
    if isinstance(feature, datasets.ClassLabel) and feature.names:
        labels = [None if label is None else there[label] for label in labels]
    labels, there = [None if label is None else str(label) for label in labels], [str(name) for name in there]
    if unknown := [name for name in classes or [] if name not in there]:
        meant = did_you_mean(unknown[0], there) or "."
        raise ValueError(f"--classes: {data} has no class '{unknown[0]}', only {', '.join(there)}{meant}")
    names = list(classes or there)
    if len(names) < 2:
        raise ValueError(f"{data} has a single class, {names[0]}: a probe needs two at least.")
    counts = Counter(labels)
    if few := [name for name in names if counts[name] < FOLDS]:
        raise ValueError(
            f"Class '{few[0]}' of {data} has {counted(counts[few[0]], 'image')}: {FOLDS} of each are needed."
        )
    numbers = {name: number for number, name in enumerate(names)}
    rows = sorted((row for row, label in enumerate(labels) if label in numbers), key=lambda row: numbers[labels[row]])
    return dataset.select(rows).select_columns("image"), np.array([numbers[labels[row]] for row in rows]), names


@torch.inference_mode()
def image_vectors(model, images: torch.Tensor) -> dict[str, np.ndarray]:
    """The four vectors of each image, by name, (B, width) each.

    Args:
        model: an [`ImageTokenizer`] in eval mode.
        images: (B, 3, height, width) in [0, 1].
    """
    encoded = model.encode(images.to(model.device))
    tokens = encoded.image_tokens.flatten(1)
    counts = torch.zeros(len(tokens), model.config.codebook_size, device=model.device)
    counts.scatter_add_(1, tokens, torch.ones_like(tokens).float())
    vectors = {
        "encoder features": encoded.last_hidden_state.mean(1),
        "quantized features": encoded.quantized_last_hidden_state[..., : model.config.hidden_size].mean(1),
        "quantized latents": model.quantizer.get_codebook_entry(tokens).mean(1),
        "bags of tokens": (counts / tokens.shape[1]).sqrt(),
    }
    return {name: values.float().cpu().numpy() for name, values in vectors.items()}


def accuracy_of_neighbours(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each image's class is found by its nearest neighbours in the other folds, (B,) of 0 and 1."""
    from sklearn.neighbors import KNeighborsClassifier

    return _right(KNeighborsClassifier(NEIGHBOURS, metric="cosine"), vectors, labels)


def accuracy_of_regression(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The same by logistic regression."""
    from sklearn.linear_model import LogisticRegression

    return _right(LogisticRegression(C=0.01, max_iter=2000), vectors, labels)


def _right(judge, vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    judge = make_pipeline(StandardScaler(), judge)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    return (cross_val_predict(judge, vectors, labels, cv=folds) == labels).astype(float)


def interval(right: np.ndarray) -> tuple[float, float]:
    """95 % of the means of bootstrap samples."""
    draws = np.random.default_rng(0).integers(len(right), size=(RESAMPLES, len(right)))
    low, high = np.quantile(right[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def probe(vectors: dict[str, np.ndarray], labels: np.ndarray) -> dict:
    """Accuracies and intervals by the name of the vectors, and the share of the most frequent class as `baseline`."""
    result = {"baseline": float(np.bincount(labels).max() / len(labels)), "rows": {}}
    for name, values in tqdm(vectors.items(), desc="Judging", unit="kind"):
        row = {}
        for judge, measure in (("knn", accuracy_of_neighbours), ("logistic", accuracy_of_regression)):
            right = measure(values, labels)
            row[judge] = {"accuracy": float(right.mean()), "interval": interval(right)}
        result["rows"][name] = row
    own = result["rows"]["encoder features"]["knn"]["accuracy"]
    for row in result["rows"].values():
        row["knn"]["of_the_encoders"] = row["knn"]["accuracy"] / own if own else None
    return result


def markdown(result: dict) -> str:
    lines = ["| vectors | kNN | of the encoder's | logistic regression |", "| --- | ---: | ---: | ---: |"]

    def cell(judged: dict) -> str:
        low, high = judged["interval"]
        return f"{judged['accuracy']:.1%} ({low:.1%} to {high:.1%})"

    for name, row in result["rows"].items():
        share = row["knn"]["of_the_encoders"]
        share = "-" if share is None else f"{share:.2f}"
        lines.append(f"| {name} | {cell(row['knn'])} | {share} | {cell(row['logistic'])} |")
    lines.append(f"| always the most frequent class | {result['baseline']:.1%} | | {result['baseline']:.1%} |")
    lines.append(
        f"\n{result['num_images']} images of {len(result['classes'])} classes: {', '.join(result['classes'])}."
    )
    return "\n".join(lines) + "\n"


def page(result: dict) -> str:
    """A page that needs no other file: a bar for each accuracy, with its interval, and all that it depends on."""
    bars, top = [], 20
    for judge in ("knn", "logistic"):
        bars.append(f'<text x="0" y="{top}" font-weight="bold">{judge}</text>')
        for name, row in result["rows"].items():
            top += 22
            accuracy, (low, high) = row[judge]["accuracy"], row[judge]["interval"]
            bars.append(
                f'<text x="0" y="{top}">{html.escape(name)}</text><rect x="150" y="{top - 12}" height="14" '
                f'width="{400 * accuracy:.1f}" fill="#1f77b4"/><path d="M{150 + 400 * low:.1f} {top - 5}H'
                f'{150 + 400 * high:.1f}" stroke="#000"/><text x="560" y="{top}">{accuracy:.1%}</text>'
            )
        bars.append(f'<path d="M{150 + 400 * result["baseline"]:.1f} {top - 100}V{top + 4}" stroke="#d62728"/>')
        top += 40
    details = {name: value for name, value in result.items() if name != "rows"}
    return (
        '<!doctype html><meta charset="utf-8"><title>Probe</title><style>body{font-family:sans-serif;margin:2em}'
        f'pre{{white-space:pre-wrap}}</style><h1>What tokens keep</h1><svg width="640" height="{top}" font-size="12">'
        f"{''.join(bars)}</svg><p>Red: the most frequent class. Lines: 95 % of bootstrap samples.</p>"
        f"<pre>{html.escape(markdown(result))}</pre><pre>{html.escape(json.dumps(details, indent=2))}</pre>"
    )


parser = CommandParser(__doc__)
parser.add_argument("--model_name_or_path", required=True, help="A tokenizer: folder or hub repository.")
add_source_options(parser, split="validation", required=True, columns=("image", "label"))
parser.add_argument("--classes", nargs="+", help="Some of the classes (default: all).")
parser.add_argument("--image_size", type=whole_number(), help="Side of the crops in pixels (default: the model's).")
parser.add_argument("--batch_size", type=whole_number(), default=16, help="Images at a time (default: 16).")
parser.add_argument("--device", type=present_device, help="Default: cuda where there is one.")
parser.add_argument("--output_dir", required=True, type=Path, help="Where the results go.")


@ends_in_one_line(smaller="--batch_size or --image_size")
def main() -> None:
    args = parser.parse_args()
    if not importlib.util.find_spec("sklearn"):
        raise RuntimeError("The probe needs scikit-learn: pip install '.[probe]'")
    options = {"config_name": args.dataset_config_name, "image_column": args.image_column}
    options |= {"split": args.split, "label_column": args.label_column}
    with ends_in_one_line(ValueError):  # such as a split that it does not have
        images, labels, names = labelled_images(args.data, args.classes, **options)
    model = load_pretrained(args.model_name_or_path, {}).eval()
    model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = args.image_size or model.config.image_size
    processor = load_processor(args.model_name_or_path, size)
    print(f"{len(images)} images of {len(names)} classes at {size} px.", flush=True)
    vectors = encode_images(model, images, processor, args.batch_size)
    result = {
        "model": args.model_name_or_path,
        "weights_sha256": weights_hash(model),
        "data": Path(args.data).name,
        "classes": names,
        "num_images": len(images),
        "image_size": size,
        "neighbours": NEIGHBOURS,
        "folds": FOLDS,
        "versions": library_versions(),
        **probe(vectors, labels),
    }
    for name, text in (
        ("probe.json", json.dumps(result, indent=2)),
        ("probe.md", markdown(result)),
        ("probe.html", page(result)),
    ):
        write_whole(args.output_dir / name, lambda path, text=text: path.write_text(text))
    print(f"\n{markdown(result)}\n{args.output_dir / 'probe.html'}")


def encode_images(
    model, dataset: datasets.Dataset, processor: VQRAEImageProcessor, batch_size: int
) -> dict[str, np.ndarray]:
    """`image_vectors` of a dataset with a column `image`, some at a time."""
    parts = []
    with tqdm(total=len(dataset), desc="Encoding", unit="image") as bar:
        for start in range(0, len(dataset), batch_size):
            images = [decode_image(record) for record in dataset[start : start + batch_size]["image"]]
            parts.append(image_vectors(model, processor(images, return_tensors="pt").pixel_values))
            bar.update(len(images))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


if __name__ == "__main__":
    main()
