"""What an evaluation leaves: JSON, Markdown, a page of HTML, pictures, metadata of a model card."""

import html
import importlib.metadata
import json
import platform
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, file_exists, hf_hub_download

from eval.files import sha256_of_files, write_whole
from eval.pictures import as_html, rows_of, save_rows
from reading.sources import is_on_hub
from reading.wording import counted


TITLES = {
    "rfid": "rFID",
    "lpips_alex": "LPIPS (AlexNet)",
    "lpips_vgg": "LPIPS (VGG)",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "blocking": "Blocking (1: no grid)",
    "flat_colours_error": "Flat colours, error of 255",
    "flat_colours_deviation": "Flat colours, deviation of 255",
    "semantic_agreement": "Semantic agreement (cosine)",
    "feature_cosine": "Cosine to the original features",
    "codebook_utilization": "Codebook utilization",
    "codebook_perplexity": "Codebook perplexity",
    "codebook_entropy": "Codebook entropy, bits",
    "codebook_tokens": "Tokens",
    "gfid": "gFID",
    "inception_score": "Inception score",
    "inception_score_deviation": "Inception score, deviation over its parts",
}
PICTURES = 8  # in each row
# of images that are left out, see `counted`
UNREAD = "image could not be read and was left out", "images could not be read and were left out"
ROOT = Path(__file__).resolve().parents[1]
# results.json comes last: where it is, the others are there, and of the same evaluation
FILES = ("code_counts.npy", "pictures.png", "neighbours.png", "report.html", "results.md", "results.json")
OF_NUMBERS = ("torch", "torchvision", "torchmetrics", "torch-fidelity", "transformers", "datasets", "accelerate")
OF_NUMBERS += ("numpy", "pillow")


def library_versions(names: tuple[str, ...] = OF_NUMBERS) -> dict[str, str]:
    """Of Python and of packages; by default of everything that the numbers may depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def code_hash() -> str:
    """SHA-256 of this repository's code from the file to the number."""
    rooms = (ROOT.glob("*_simvq*.py"), (ROOT / "reading").rglob("*.py"), (ROOT / "eval").rglob("*.py"))
    return sha256_of_files(*sorted(file for room in rooms for file in room))


def remove_results(output: Path) -> None:
    """Removes what an evaluation before left in a folder: it is not of the one that begins."""
    for name in reversed(FILES):
        (output / name).unlink(missing_ok=True)


def title(metric: str) -> str:
    """For people: "fd_dinov2-large" becomes "FD-dinov2-large", "recall_dinov2-large" "Recall (dinov2-large)"."""
    kind, _, features = metric.partition("_")
    if kind in ("precision", "recall", "density", "coverage"):
        return f"{kind.capitalize()} ({features})"
    return f"FD-{features}" if kind == "fd" else TITLES.get(metric, metric)


def markdown(result: dict) -> str:
    """The table of a result."""
    lines = ["| metric | value |", "| --- | ---: |"]
    order = [name for name in TITLES if name in result["metrics"]]
    order += [name for name in result["metrics"] if name not in TITLES]
    for name in order:
        value = result["metrics"][name]
        why = result["not_computed"].get(name, "").split(":")[0].split(" (")[0]
        lines.append(f"| {title(name)} | {why if value is None else f'{value:.6g}'} |")
    lines.append(f"| images | {result['num_images']} |")
    size = f"{result['image_size']} px" if result["image_size"] else "images as they are"
    notes = [f"Protocol `{result['protocol']['name']}`, {size}."]
    if unread := len(result["skipped_images"]) - result["num_not_finite"]:
        notes.append(f"{counted(unread, *UNREAD)}.")
    if result["num_not_finite"]:
        notes.append(
            f"{counted(result['num_not_finite'], 'image was', 'images were')} left out because numbers of the "
            "model were not finite: `skipped_images` of results.json names them."
        )
    return "\n".join(lines + ["", *(f"- {note}" for note in notes + result["warnings"])]) + "\n"


def write_results(output: Path, result: dict, evaluation, images, reconstruct, device: torch.device) -> None:
    """Writes everything, results.json last, and prints the table.

    Args:
        output: folder.
        result: what goes into results.json.
        evaluation: joined and computed.
        images: [`CroppedImages`], for the pictures.
        reconstruct: as for `evaluate`.
        device: of the tokenizer.
    """
    written = []
    if evaluation.counts is not None:
        write_whole(output / "code_counts.npy", lambda f: _save_array(f, evaluation.counts.numpy()))
        written.append("code_counts.npy")
    by = next((name for name in ("lpips_vgg", "lpips_alex", "psnr") if name in evaluation.scores), None)
    groups = {}
    if by:
        for name, places in choose(evaluation.scores[by], best_first=not by.startswith("lpips")).items():
            rows = _reconstructed([evaluation.index[i] for i in places], images, reconstruct, device)
            groups[name] = rows, [evaluation.scores[by][i] for i in places]
        joined = [torch.cat(rows) for rows in zip(*(rows for rows, _ in groups.values()))]
        save_rows(joined, output / "pictures.png", columns=max(len(scores) for _, scores in groups.values()))
        written.append(f"pictures.png (best, median, worst by {title(by)}: originals, reconstructions, errors x 4)")
    write_whole(output / "report.html", lambda f: f.write_text(_page(result, evaluation, groups, by)))
    table = markdown(result)
    write_whole(output / "results.md", lambda f: f.write_text(table))
    write_whole(output / "results.json", lambda f: f.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n"))
    written += ["report.html", "results.md", "results.json"]
    print(table)
    for name in written:
        print(output / name)


def _save_array(file: Path, array: np.ndarray) -> None:
    with file.open("wb") as stream:  # given a name, np.save would add a suffix to it
        np.save(stream, array)


def choose(scores: list[float], best_first: bool) -> dict[str, list[int]]:
    """Which images to show, by rank: up to `PICTURES` each of the best, the middle and the worst, none of them twice.

    Args:
        scores: one for each image.
        best_first: a high score is a good one.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i] if best_first else scores[i])
    count = min(PICTURES, max(1, len(order) // 3))
    middle = (len(order) - count) // 2
    chosen = {"best": order[:count], "median": order[middle : middle + count], "worst": order[-count:]}
    return chosen if len(order) >= 3 else {"all": order}


def _reconstructed(index: list[int], images, reconstruct, device: torch.device) -> list[torch.Tensor]:
    """Originals, reconstructions and four times their mean absolute error over colours: (B, 3, H, W) each."""
    items = [images[i] for i in index]
    originals = torch.stack([item["original"] for item in items]) / 255
    if reconstruct is None:
        fakes = torch.stack([item["reconstruction"] for item in items]) / 255
    else:
        with torch.inference_mode():
            fakes = reconstruct(originals.to(device))[0].float().cpu().clamp(0, 1)
    errors = (4 * (originals - fakes).abs().mean(1, keepdim=True)).expand_as(originals)
    return [originals, fakes, errors]


def _page(result: dict, evaluation, groups: dict, by: str | None) -> str:
    """A page that needs no other file."""
    parts = []
    for name, (rows, scores) in groups.items():
        values = ", ".join(f"{score:.4g}" for score in scores)
        parts.append(
            f"<h3>{name.capitalize()} by {title(by)}</h3><p><small>{values}</small></p>"
            + as_html(rows_of(rows, columns=len(scores)))
        )
    pictures = "".join(parts) or "<p>No metric to choose images by.</p>"
    table = "".join(
        f"<tr><td>{title(name)}</td><td>{'' if value is None else f'{value:.6g}'}</td>"
        f"<td>{html.escape(result['not_computed'].get(name, ''))}</td></tr>"
        for name, value in result["metrics"].items()
    )
    warnings = "".join(f"<li>{html.escape(text)}</li>" for text in result["warnings"] + result["skipped_images"])
    codes = ""
    if evaluation.counts is not None:
        codes = "<h2>Use of the codes</h2>" + code_chart(evaluation.counts)
    details = {name: value for name, value in result.items() if name not in ("metrics", "warnings")}
    return (
        '<!doctype html><meta charset="utf-8"><title>Reconstruction</title><style>body{font-family:sans-serif;'
        "margin:2em}img{max-width:100%}td{padding:0 1em 0 0;vertical-align:top}pre{white-space:pre-wrap}</style>"
        f"<h1>Reconstruction, protocol {html.escape(result['protocol']['name'])}</h1>"
        f"<table>{table}<tr><td>Images</td><td>{result['num_images']}</td></tr></table><ul>{warnings}</ul>"
        f"{codes}<h2>Pictures</h2><p>Originals, reconstructions, and four times the absolute error.</p>{pictures}"
        f"<h2>Everything the numbers depend on</h2><pre>{html.escape(json.dumps(details, indent=2))}</pre>"
    )


def code_chart(counts: torch.Tensor, width: int = 640, height: int = 220) -> str:
    """An SVG of the share of tokens that each code has, the most frequent code first, on logarithmic axes; the dashed
    line is where all codes are used alike."""
    used = counts[counts > 0].double().sort(descending=True).values / counts.sum()
    ranks = torch.arange(1, len(used) + 1, dtype=torch.float64)
    points = torch.logspace(0, np.log10(len(used)), 400).long().clamp(1, len(used)).unique() - 1
    low, high = min(used[-1].item(), 1 / len(counts)), used[0].item()
    left, bottom, top, right = 70, height - 30, 10, width - 10
    span_x, span_y = np.log10(max(len(counts), 2)), np.log10(high / low) or 1

    def at(rank: float, share: float) -> str:
        x = left + np.log10(rank) / span_x * (right - left)
        return f"{x:.1f},{bottom - np.log10(share / low) / span_y * (bottom - top):.1f}"

    line = " ".join(at(ranks[i].item(), used[i].item()) for i in points.tolist())
    even = f"{at(1, 1 / len(counts))} {at(len(counts), 1 / len(counts))}"
    return (
        f'<svg width="{width}" height="{height}" font-size="11"><path d="M{left} {top}V{bottom}H{right}" fill="none" '
        f'stroke="#999"/><polyline points="{even}" stroke="#999" stroke-dasharray="4" fill="none"/>'
        f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="2"/>'
        f'<text x="{left - 4}" y="{top + 8}" text-anchor="end">{high:.2g}</text>'
        f'<text x="{left - 4}" y="{bottom}" text-anchor="end">{low:.2g}</text>'
        f'<text x="{left}" y="{height - 14}">most frequent code</text><text x="{right}" y="{height - 14}" '
        f'text-anchor="end">code {len(counts):,}</text><text x="{left}" y="{height - 2}">share of the tokens; '
        f"{len(used):,} codes in use</text></svg>"
    )


def evaluation_results(result: dict, file_hash: str | None = None) -> list[EvalResult]:
    """The numbers of a results.json as entries of a model card's model-index. There, entries of one dataset (type,
    config, split) share its name and arguments: what else an evaluation depends on belongs to the metric.

    Args:
        result: as in results.json.
        file_hash: of the file of weights that was measured, see `weights_file_hash`.
    """
    data, protocol = result["data"], result["protocol"]["name"]
    name, on_hub = Path(data["name"]).name, data["split"] is not None and is_on_hub(data["name"])
    of = f"protocol {protocol}, {counted(result['num_images'], 'image')} of {result['image_size']} px"
    arguments = {"protocol": protocol, "image_size": result["image_size"], "num_images": result["num_images"]}
    arguments |= {"pixels_sha256": data["pixels_sha256"]} | ({"model_sha256": file_hash} if file_hash else {})
    return [
        EvalResult(
            task_type="image-to-image",
            task_name="Image reconstruction",
            dataset_type=data["name"] if on_hub else "imagefolder",  # as datasets calls a folder of images
            dataset_name=name,
            dataset_config=data["config"] if on_hub else name,
            dataset_split=data["split"],
            metric_type=metric,
            metric_name=f"{title(metric)}, {of}",
            metric_value=value,
            metric_args=arguments,
        )
        for metric, value in result["metrics"].items()
        if value is not None
    ]


def weights_file_hash(folder: Path) -> str | None:
    """SHA-256 of a folder's `model*.safetensors`; `None` where there is none."""
    files = sorted(folder.glob("model*.safetensors"))
    return sha256_of_files(*files) if files else None


def check_model_card(name_or_path: str, revision: str | None) -> None:
    """Whether `update_model_card` can do what it shall, asked before there is anything to write.

    Raises:
        ValueError: there is no card, or the revision is no branch.
    """
    if Path(name_or_path).is_dir():
        if not Path(name_or_path, "README.md").is_file():
            raise ValueError(f"--update_model_card: {name_or_path} has no README.md.")
        return
    branches = [branch.name for branch in HfApi().list_repo_refs(name_or_path).branches]
    if revision is not None and revision not in branches:
        raise ValueError(
            f"--update_model_card writes to a branch, and --revision {revision} is none of {name_or_path}, which has "
            f"{', '.join(branches)}: a tag or a commit cannot be changed. Pass the branch, or leave out "
            "--update_model_card."
        )
    if not file_exists(name_or_path, "README.md", revision=revision):
        raise ValueError(f"--update_model_card: {name_or_path} has no README.md at {revision or 'main'}.")


def update_model_card(name_or_path: str, result: dict, revision: str | None = None) -> None:
    """Puts the numbers into the model-index of a model's card; those it has of the same data and protocol are replaced.

    Args:
        name_or_path: the model's folder, or its repository on the hub, to which the card is pushed.
        result: as in results.json.
        revision: the branch of the repository, whose card is read and written; `None`: main.
    """
    folder = Path(name_or_path)
    local = folder.is_dir()
    card = ModelCard.load(
        folder / "README.md" if local else hf_hub_download(name_or_path, "README.md", revision=revision)
    )
    new = evaluation_results(result, weights_file_hash(folder) if local else None)
    replaced = {(entry.dataset_name, entry.metric_name) for entry in new}
    old = [x for x in card.data.eval_results or [] if (x.dataset_name, x.metric_name) not in replaced]
    card.data.model_name = card.data.model_name or Path(name_or_path).resolve().name
    card.data.eval_results = old + new
    if local:
        write_whole(folder / "README.md", lambda file: file.write_text(str(card)))
    else:
        card.push_to_hub(name_or_path, commit_message="Evaluation results", revision=revision)
