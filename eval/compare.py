#!/usr/bin/env python
"""Puts evaluations side by side.

    python -m eval.compare a/results.json b/results.json [more/results.json ...]

Prints a Markdown table, one column a run, with the difference to the first. Runs under different protocols, or on other
images, are not compared: their numbers mean different things.
"""

import sys
from pathlib import Path

from eval.commands import CommandParser, ends_in_one_line
from eval.files import read_fields
from eval.results import title
from reading.wording import counted


def read_result(path: Path) -> dict:
    """A results.json.

    Raises:
        ValueError: it is something else.
    """
    result = read_fields(path)
    if result.get("schema_version") != 1:
        raise ValueError(f"{path} is no results.json of schema 1.")
    return result


def differences(first: dict, other: dict) -> list[str]:
    """What makes two results incomparable, in words."""
    found = []
    descriptive = ("name", "source", "reference_set", "remarks")
    descriptive += ("ms_ssim", "semantic_agreement", "blocking", "flat_colours")  # what is measured besides
    pairs = {name: (value, other["protocol"].get(name)) for name, value in first["protocol"].items()}
    fields = [f"{name} ({a} / {b})" for name, (a, b) in pairs.items() if a != b and name not in descriptive]
    if fields:
        names = first["protocol"]["name"], other["protocol"]["name"]
        found.append(f"protocols {names[0]} and {names[1]} differ in {', '.join(fields)}")
    if first["image_size"] != other["image_size"]:
        found.append(f"images of {first['image_size']} and {other['image_size']} px")
    if first["num_images"] != other["num_images"]:
        found.append(f"{first['num_images']} and {counted(other['num_images'], 'image')}")
    elif first["data"]["pixels_sha256"] != other["data"]["pixels_sha256"]:
        found.append("the originals are not the same images")
    statistics = [result["networks"].get("reference_statistics") for result in (first, other)]
    if "rfid" in first["networks"].keys() & other["networks"].keys() and statistics[0] != statistics[1]:
        found.append("rFID against other reference statistics")
    for name in first["networks"].keys() & other["networks"].keys() - {"reference_statistics"}:
        if first["networks"][name] != other["networks"][name]:
            found.append(f"other weights of the network of {name}")
    return found


def table(results: list[dict], names: list[str], found: list[str] = ()) -> str:
    """A Markdown table of results; below it what else differs, `found` first."""
    metrics = dict.fromkeys(metric for result in results for metric in result["metrics"])
    lines = [f"| metric | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for metric in metrics:
        values = [result["metrics"].get(metric) for result in results]
        cells = []
        for value in values:
            cell = "-" if value is None else f"{value:.5g}"
            if value is not None and values[0] is not None and cells and metric != "codebook_tokens":
                cell += f" ({value - values[0]:+.3g})"
            cells.append(cell)
        lines.append(f"| {title(metric)} | {' | '.join(cells)} |")
    versions = {f"{name} {result['versions'][name]}" for result in results for name in result["versions"]}
    differing = sorted(text for text in versions if any(text not in _versions(result) for result in results))
    notes = [f"- not comparable: {text}" for text in found]
    notes += [f"- library versions that differ: {', '.join(differing)}"] if differing else []
    dtypes = [result["source"]["dtype"] for result in results if "dtype" in result["source"]]
    notes += [f"- dtypes of the models: {', '.join(dtypes)}"] if len(set(dtypes)) > 1 else []
    return "\n".join(lines + [""] * bool(notes) + notes)


def _versions(result: dict) -> set[str]:
    return {f"{name} {version}" for name, version in result["versions"].items()}


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "results", nargs="+", type=Path, help="results.json files of eval/reconstruction.py, or their folders."
    )
    parser.add_argument(
        "--allow_differences",
        action="store_true",
        help="Compare in spite of other protocols, images or reference statistics; what differs is printed.",
    )
    args = parser.parse_args()
    if len(args.results) < 2:
        parser.error("pass at least two files")
    args.results = [path / "results.json" if path.is_dir() else path for path in args.results]
    if missing := [str(path) for path in args.results if not path.is_file()]:
        parser.error(f"there is no {', '.join(missing)}")
    results = [read_result(path) for path in args.results]
    found = [
        f"{args.results[0]} and {path}: {text}"
        for path, result in zip(args.results[1:], results[1:])
        for text in differences(results[0], result)
    ]
    if found and not args.allow_differences:
        print("\n".join(found), file=sys.stderr)
        sys.exit("Not compared. --allow_differences does it nevertheless.")
    print(table(results, [str(path.parent) for path in args.results], found))


if __name__ == "__main__":
    with ends_in_one_line():
        main()
