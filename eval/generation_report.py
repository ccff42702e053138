"""What `eval.generation` leaves: JSON, Markdown, a page of HTML, and pictures."""

import html
import json
from pathlib import Path

import torch

from eval.crops import CroppedImages
from eval.files import write_whole
from eval.image_features import ImageFeatures
from eval.pictures import as_html, rows_of
from eval.results import UNREAD, choose, title
from reading.wording import counted


SAMPLES, COLUMNS = 32, 8  # in the picture of samples
LONGEST = 20  # of a list of samples.json, on the page
GROUPS = {
    "best": "Samples that are nearest to a training image",
    "median": "Samples in the middle",
    "worst": "Samples that are furthest from all training images",
    "all": "All samples",
}


def tables(result: dict) -> list[list[list[str]]]:
    """The tables of a result: rows of cells, the heads first."""
    columns = {"samples": result} | result["baselines"]
    metrics = [["metric", *columns]]
    for metric in result["metrics"]:
        cells = [title(metric)]
        for column in columns.values():
            value, why = column["metrics"].get(metric), column["not_computed"].get(metric, "")
            cells.append(why.split(":")[0].split(" (")[0] if value is None else f"{value:.6g}")
        metrics.append(cells)
    for name, count in (("images", "num_images"), ("real images", "num_real_images")):
        counts = (column[count] for column in columns.values())
        metrics.append([name, *("-" if value is None else f"{value:,}" for value in counts)])
    if not result["neighbours"]:
        return [metrics]
    of = result["neighbours"]["distances"]
    distances = [["distance to the nearest training image", *of]]
    for share in of["samples"]:
        name = {"0.0": "smallest", "0.5": "median", "1.0": "largest"}.get(share, f"{float(share):.0%} are nearer")
        distances.append([name, *(f"{part[share]:.4g}" for part in of.values())])
    return [metrics, distances]


def notes(result: dict) -> list[str]:
    """What is to be known of the tables, in sentences; warnings last."""
    size = f"{result['image_size']} px" if result["image_size"] else "images as they are"
    said = [f"Protocol `{result['protocol']['name']}`, {size}."]
    if result["reference_statistics"]:
        said.append(f"gFID of samples and of training images is against {result['reference_statistics']}.")
    if "halves of the real images" in result["baselines"]:
        said.append(
            "Halves: one half of the real images against the other. Samples that cannot be told from real images have "
            "such numbers, if there are as few of them; with fewer images, distances are larger."
        )
    if "training images" in result["baselines"]:
        said.append("Training images: as many of them as there are samples, if there are, in the place of the samples.")
    if neighbours := result["neighbours"]:
        features = "Inception" if neighbours["features"] == "rfid" else neighbours["features"].removeprefix("fd_")
        said.append(
            f"Distances are L2 on features of {features}; "
            f"{counted(neighbours['copies'], 'sample is', 'samples are')} one of the "
            f"{neighbours['num_training_images']:,} training images, pixel by pixel."
        )
        if "nearer_than_5_percent_of_real" in neighbours:
            said.append(
                f"{neighbours['nearer_than_5_percent_of_real']:.1%} of the samples are nearer to a training image than "
                "95 % of the real images are. Where that is much more than 5 %, look whether they are memorised."
            )
    if result["source"]["made_by"] is None:
        said.append("There is no samples.json beside the samples: what made them is not known.")
    if result["skipped_images"]:
        said.append(f"{counted(len(result['skipped_images']), *UNREAD)}.")
    return said + result["warnings"]


def markdown(result: dict) -> str:
    """The tables of a result, and what is to be known of them."""
    lines = []
    for head, *rows in tables(result):
        lines += [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join(lines + [f"- {note}" for note in notes(result)]) + "\n"


def write_report(
    output: Path,
    result: dict,
    images: dict[str, CroppedImages],
    sets: dict[str, ImageFeatures],
    distances: torch.Tensor | None = None,
    found: torch.Tensor | None = None,
) -> None:
    """Writes everything, results.json last, and prints the tables. The neighbours that are drawn go into the result.

    Args:
        output: folder.
        result: what goes into results.json.
        images: `samples`, and `training` images.
        sets: their features, which say which of the images could be read.
        distances, found: of each sample to its nearest training images, and their numbers, (M, count); `None`: there
            are no training images.
    """
    places = sets["samples"].index
    # some of all, evenly, in their order: classes stand one after the other
    chosen = [places[i * len(places) // min(SAMPLES, len(places))] for i in range(min(SAMPLES, len(places)))]
    samples = rows_of([_stack(images["samples"], chosen)], columns=COLUMNS)
    write_whole(output / "pictures.png", lambda file: samples.save(file, format="PNG"))
    pictures = f"<h2>Samples</h2>{as_html(samples)}"
    written = ["pictures.png"]
    if distances is not None:
        rows, names, parts = [], [], []
        for name, group in choose(distances[:, 0].tolist(), best_first=False).items():
            trained_on = [[sets["training"].index[i] for i in found[group, rank]] for rank in range(found.shape[1])]
            group_rows = [_stack(images["samples"], [places[i] for i in group])]
            group_rows += [_stack(images["training"], numbers) for numbers in trained_on]
            values = ", ".join(f"{value:.4g}" for value in distances[group, 0].tolist())
            parts.append(
                f"<h3>{GROUPS[name]}</h3><p><small>{values}</small></p>{as_html(rows_of(group_rows, len(group)))}"
            )
            rows.append(group_rows)
            names += [
                {
                    "sample": images["samples"].data[places[i]]["image"]["path"],
                    "nearest": [images["training"].data[numbers[place]]["image"]["path"] for numbers in trained_on],
                    "distances": distances[i].tolist(),
                }
                for place, i in enumerate(group)
            ]
        joined = rows_of([torch.cat(parts) for parts in zip(*rows)], columns=len(rows[0][0]))
        write_whole(output / "neighbours.png", lambda file: joined.save(file, format="PNG"))
        written.append("neighbours.png (nearest, median, furthest samples; below each, the nearest training images)")
        pictures += (
            "<h2>Nearest training images</h2><p>A sample, and below it the training images that are nearest.</p>"
        )
        pictures += "".join(parts)
        result = result | {"neighbours": result["neighbours"] | {"drawn": names}}
    table = markdown(result)
    write_whole(output / "report.html", lambda file: file.write_text(_page(result, pictures)))
    write_whole(output / "results.md", lambda file: file.write_text(table))
    write_whole(output / "results.json", lambda file: file.write_text(json.dumps(result, indent=2, allow_nan=False)))
    print(table)
    for name in (*written, "report.html", "results.md", "results.json"):
        print(output / name)


def _stack(images: CroppedImages, numbers: list[int]) -> torch.Tensor:
    return torch.stack([images[number]["original"] for number in numbers]) / 255


def _page(result: dict, pictures: str) -> str:
    """A page that needs no other file."""
    parts = []
    for head, *rows in tables(result):
        parts.append(f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>")
        parts += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
        parts.append("<tr><td>&nbsp;</td></tr>")
    said = "".join(f"<li>{html.escape(note)}</li>" for note in notes(result))
    details = {name: value for name, value in result.items() if name not in ("metrics", "baselines", "neighbours")}
    details["source"] = result["source"] | {"made_by": _shortened(result["source"]["made_by"])}
    return (
        '<!doctype html><meta charset="utf-8"><title>Generated images</title><style>body{font-family:sans-serif;'
        "margin:2em}img{max-width:100%}th,td{padding:0 1em 0 0;text-align:left}pre{white-space:pre-wrap}</style>"
        f"<h1>Generated images, protocol {html.escape(result['protocol']['name'])}</h1>"
        f"<table>{''.join(parts)}</table><ul>{said}</ul>{pictures}"
        f"<h2>Everything the numbers depend on</h2><pre>{html.escape(json.dumps(details, indent=2))}</pre>"
    )


def _shortened(made_by: dict | None) -> dict | None:
    """Without the long lists that results.json has: of tens of thousands of seeds, no reader of a page needs each."""
    return made_by and {
        name: f"{len(value):,} values" if isinstance(value, list) and len(value) > LONGEST else value
        for name, value in made_by.items()
    }
