#!/usr/bin/env python
"""Judges generated images against real ones, and shows how near they are to those that the generator was trained on.

    python -m eval.generation --samples runs/samples --real held_out_images --train_data training_images \\
        --feature_encoder facebook/dinov2-large --image_size 224 --output_dir results
    python -m eval.generation --samples runs/samples --reference_statistics VIRTUAL_imagenet256_labeled.npz \\
        --protocol imagenet-256 --output_dir results

Any folder of images is a folder of samples; where `samples.json` lies in it, as `generation.sample` writes, what that
says of model, seeds and guidance goes into the results. Beside the samples, the same numbers are told of as many
training images, and of one half of the real images against the other: distances of few images are biased, and a number
means something only beside these.

gfid, inception_score                  on FID's Inception, if its weights can be had
fd_NAME                                Fréchet distance on the features of each --feature_encoder
precision, recall, density, coverage   on either: shares of images that lie in neighbourhoods of the other set

Writes results.json (every number with all that it depends on), results.md, report.html, pictures.png (samples) and
neighbours.png (samples, below each the three training images that are nearest). An interrupted run goes on when the
same command is given again; `accelerate launch -m eval.generation ...` shares the images among processes.
"""

import argparse
from collections import Counter
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from tqdm import tqdm

from eval.commands import CommandParser, ends_in_one_line
from eval.crops import CroppedImages, different_sizes
from eval.evaluation import Networks, few_images
from eval.files import read_fields
from eval.generation_report import write_report
from eval.image_features import ImageFeatures
from eval.manifolds import manifold_metrics, nearest
from eval.networks import load_networks
from eval.options import present_device, whole_number
from eval.protocol import GENERATION_FOLDER, GenerationProtocol, Protocol, names
from eval.reconstruction import evaluate, progress_key, remove_progress, start
from eval.results import code_hash, library_versions, remove_results, title
from eval.rfid.rfid import Moments, frechet_distance
from reading.files import dataset_of_files, find_images
from reading.wording import counted


MANIFOLD = ("precision", "recall", "density", "coverage")
OF_INCEPTION = ("gfid", "inception_score", "inception_score_deviation", *(f"{name}_inception" for name in MANIFOLD))
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SHOWN_NEIGHBOURS = 3


def sample_files(folder: Path) -> tuple[list[Path], dict | None]:
    """Images of a folder of samples, and the fields of its samples.json; `None` where there is none.

    Raises:
        ValueError: no folder, no images in it, or a samples.json that cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"--samples: there is no folder {folder}.")
    files = find_images(folder)
    if not (folder / "samples.json").is_file():
        return files, None
    files = [file for file in files if file != folder / "grid.png"]  # of all of them
    if not files:
        raise ValueError(f"--samples: {folder} holds a samples.json, but no image beside grid.png.")
    made_by = read_fields(folder / "samples.json")
    images, settings = made_by.get("images", []), made_by.get("settings", {})
    if not (
        isinstance(images, list) and all(isinstance(image, dict) for image in images) and isinstance(settings, dict)
    ):
        raise ValueError(
            f"{folder / 'samples.json'} is not as generation.sample writes it: `images` must be a list of objects and "
            "`settings` an object. Without this file the images are judged as they are."
        )
    return files, made_by


def departures(protocol: GenerationProtocol, made_by: dict | None, count: int) -> list[str]:
    """In which points samples are not what a protocol asks for, or do not say that they are, in words.

    Args:
        protocol: see [`GenerationProtocol`].
        made_by: the fields of samples.json: `images` with a `seed` and a `condition` each, and `settings`.
        count: how many samples there are.
    """
    made_by = made_by or {}
    listed, found = made_by.get("images"), []
    if protocol.num_samples not in (None, count):
        found.append(f"{counted(count, 'sample')} instead of {protocol.num_samples:,}")
    if listed is not None and len(listed) != count:
        found.append(f"samples.json tells of {counted(len(listed), 'image')}, not of {count:,}")
    if protocol.balanced_classes:
        if not listed or any(image.get("condition") is None for image in listed):
            found.append("the classes of the samples are not known")
        else:
            of_class = Counter(image["condition"] for image in listed).values()
            if max(of_class) - min(of_class) > 1:
                found.append(f"classes are not balanced: {min(of_class):,} to {max(of_class):,} samples of each")
    if protocol.seeds:
        seeds = [image.get("seed") for image in listed or []]
        if not seeds or None in seeds:
            found.append("the seeds of the samples are not known")
        elif repeated := len(seeds) - len(set(seeds)):
            found.append(f"{counted(repeated, 'sample has', 'samples have')} the seed of another")
    if protocol.guidance_scale is not None:
        scale = made_by.get("settings", {}).get("guidance_scale")
        if scale is None:
            found.append("the guidance scale of the samples is not known")
        elif protocol.guidance_scale not in ("any", scale):
            found.append(f"guidance {scale} instead of {protocol.guidance_scale}")
    return found


def measure(
    fake: dict[str, torch.Tensor],
    real: dict[str, torch.Tensor] | None,
    protocol: GenerationProtocol,
    statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Metrics by name, and the reason for each that is `None`.

    Args:
        fake: features of generated images, as [`ImageFeatures`] has them, (M, D) each.
        real: the same of real ones, (N, D); `None`: there are none.
        protocol: says k.
        statistics: mean and covariance of Inception's features of a reference set, for `gfid` in place of `real`.
        device: where it is computed.
    """
    metrics, reasons = {}, {}
    for name, features in fake.items():
        if name == "logits":
            continue
        inception = name == "rfid"
        distance, kind = ("gfid", "inception") if inception else (name, name.removeprefix("fd_"))
        neighbours = protocol.inception_neighbours if inception else protocol.neighbours
        features = features.to(device)
        others = None if real is None else real[name].to(device)
        known = statistics if inception else None
        if known is None and others is not None:
            known = _moments(others)
        if known is None:
            metrics[distance], reasons[distance] = None, "no real images: pass --real"
        else:
            metrics[distance] = frechet_distance(*_moments(features), *(tensor.to(device) for tensor in known))
        of_manifold = [f"{metric}_{kind}" for metric in MANIFOLD]
        fewest = 0 if others is None else min(len(features), len(others))
        if fewest > neighbours:
            metrics |= zip(of_manifold, manifold_metrics(features, others, neighbours).values())
        else:
            why = f"{neighbours} neighbours need {neighbours + 1} images of either side, not {fewest}"
            why = "no real images: pass --real" if others is None else why
            metrics, reasons = metrics | dict.fromkeys(of_manifold), reasons | dict.fromkeys(of_manifold, why)
        if inception:
            of_score = OF_INCEPTION[1:3]
            splits, logits = protocol.inception_score_splits, fake.get("logits")
            if logits is None or len(logits) < splits:
                why = "the weights have no classifier" if logits is None else f"fewer images than its {splits} parts"
                metrics, reasons = metrics | dict.fromkeys(of_score), reasons | dict.fromkeys(of_score, why)
            else:
                metrics |= zip(of_score, isc_features_to_metric(logits, splits).values())
    return metrics, reasons


def _moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    moments = Moments(features.shape[1], features.device)
    for part in features.split(8192):
        moments.update(part)
    return moments.compute()


def draw(count: int, among: int) -> torch.Tensor:
    """`count` of the numbers below `among`, at most all, always the same."""
    return torch.randperm(among, generator=torch.Generator().manual_seed(0))[:count]


def halves(features: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Two random halves of a set, of as many images each."""
    count = len(next(iter(features.values())))
    order = draw(count, count)
    parts = order[: count // 2], order[count // 2 : count // 2 * 2]
    return [{name: values[part] for name, values in features.items()} for part in parts]


def quantiles(distances: torch.Tensor) -> dict[str, float]:
    """By the share of values below."""
    return dict(zip(map(str, QUANTILES), distances.quantile(distances.new_tensor(QUANTILES)).tolist()))


def judge(
    sets: dict[str, ImageFeatures], networks: Networks, protocol: GenerationProtocol, device: torch.device
) -> tuple[dict, list[str]]:
    """What goes into the results of the samples' metrics, and of those of what they are to be seen beside; warnings.

    Args:
        sets: features of `samples`, and of `real` and `training` images where there are any.
        networks: for the reference statistics.
        protocol: see [`GenerationProtocol`].
        device: where it is computed.
    """
    samples, real, training = (sets.get(name) for name in ("samples", "real", "training"))
    statistics = networks.reference_statistics.get("rfid")
    against = None if real is None else real.features
    compared = {"samples": (samples.features, against, statistics)}
    if training is not None and (real is not None or statistics is not None):
        chosen = draw(len(samples.index), len(training.index))
        part = {name: values[chosen] for name, values in training.features.items()}
        compared["training images"] = part, against, statistics
    if real is not None and len(real.index) >= 4:
        compared["halves of the real images"] = *halves(real.features), None
    found, warnings = {}, []
    for name, (fake, others, known) in tqdm(compared.items(), desc="Comparing", unit="pair"):
        metrics, reasons = measure(fake, others, protocol, known, device)
        counts = [None if part is None else len(next(iter(part.values()))) for part in (fake, others)]
        found[name] = {"num_images": counts[0], "num_real_images": counts[1], "metrics": metrics}
        found[name]["not_computed"] = reasons
    of_samples = found.pop("samples")
    for name, features in samples.features.items():
        distance = "gfid" if name == "rfid" else name
        if of_samples["metrics"].get(distance) is None:
            continue
        counts = [of_samples["num_images"]]
        others = "the reference statistics"
        if statistics is None or name != "rfid":
            counts.append(of_samples["num_real_images"])
            others = counted(counts[1], "real image")
        warnings += few_images(
            title(distance), f"{counted(counts[0], 'sample')} and {others}", min(counts), features.shape[1]
        )
    if (equal := len(samples.digests) - len(set(samples.digests))) > 0:
        warnings.append(f"{equal:,} of {len(samples.digests):,} samples are equal, pixel by pixel, to another one.")
    return of_samples | {"baselines": found}, warnings


def memorised(
    sets: dict[str, ImageFeatures], name: str, device: torch.device
) -> tuple[dict, list[str], torch.Tensor, torch.Tensor]:
    """How near samples, and real images that were not trained on, are to the training images.

    Args:
        sets: features of `samples` and `training` images, and of `real` ones where there are any.
        name: of the features.
        device: where it is computed.

    Returns:
        what goes into the results; warnings; distances of each sample to its nearest training images, in ascending
        order, and the numbers of these among them.
    """
    samples, real, training = (sets.get(name) for name in ("samples", "real", "training"))
    among, warnings = training.features[name].to(device), []
    distances, found = (x.cpu() for x in nearest(samples.features[name].to(device), among, SHOWN_NEIGHBOURS))
    known = set(training.digests)
    result = {
        "features": name,
        "num_training_images": len(among),
        "copies": sum(digest in known for digest in samples.digests),
        "distances": {"samples": quantiles(distances[:, 0])},
    }
    if result["copies"]:
        warnings.append(
            f"{counted(result['copies'], 'sample is one of the', 'samples are')} training images, pixel by pixel."
        )
    if real is not None:
        held_out = nearest(real.features[name].to(device), among, 1)[0][:, 0].cpu()
        result["distances"]["real images"] = quantiles(held_out)
        nearer = distances[:, 0] < held_out.quantile(0.05)
        result["nearer_than_5_percent_of_real"] = nearer.double().mean().item()
        if both := sum(digest in known for digest in real.digests):
            warnings.append(
                f"{both:,} of the real images are training images: their distances to these do not tell what is to be "
                "expected of new images. Pass real images that were held out."
            )
    return result, warnings, distances, found


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(__doc__)
    what = parser.add_argument_group("which images")
    what.add_argument("--samples", type=Path, required=True, help="The folder of the generated images.")
    what.add_argument(
        "--real",
        type=Path,
        help="Real images to compare with: a folder, or a .txt file with the path of an image in each line. With "
        "--train_data, such as were not trained on.",
    )
    what.add_argument(
        "--reference_statistics",
        help="An .npz file with mu and sigma of Inception's features, for gFID against it, as ADM has them "
        "(or made by eval/reference_statistics.py).",
    )
    what.add_argument(
        "--train_data",
        type=Path,
        help="The images that the generator was trained on, a folder or a .txt file: shows what it has memorised.",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--protocol",
        default="default",
        help=f"One of {', '.join(names(GENERATION_FOLDER))} (default: default), or a .json file.",
    )
    how.add_argument(
        "--image_size", type=whole_number(), help="Side of the crops of all images, where the protocol does not say."
    )
    how.add_argument("--batch_size", type=whole_number(), default=32, help="Images at a time (default: 32).")
    how.add_argument(
        "--num_workers", type=whole_number(0), help="Processes that load images (default: 8 beside a GPU, else 0)."
    )
    how.add_argument("--device", type=present_device, help="Default: cuda where there is one.")
    features = parser.add_argument_group("on which features")
    features.add_argument(
        "--feature_encoder",
        nargs="+",
        default=[],
        help="Vision models of transformers, names of the hub or folders, such as facebook/dinov2-large (or "
        "module:function from (B, 3, H, W) of uint8 to (B, D)). Neighbours are those on the first one's features.",
    )
    features.add_argument("--inception_weights", help="Local file with torch-fidelity's Inception weights.")
    features.add_argument("--no_inception", action="store_true", help="Leave out what needs Inception.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the results go.")
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args()
    if not (args.real or args.reference_statistics or args.train_data):
        parser.error("pass what the samples are compared with: --real, --reference_statistics or --train_data")
    if args.no_inception and (args.inception_weights or args.reference_statistics):
        parser.error("--inception_weights and --reference_statistics have no effect with --no_inception")
    if args.no_inception and not args.feature_encoder:
        parser.error("--no_inception leaves no features: pass --feature_encoder")
    return args


def _described(path: Path | None, features: ImageFeatures | None) -> dict | None:
    """A set of images, for the results."""
    if features is None:
        return {"name": None, "num_images": 0, "pixels_sha256": None}
    return {"name": str(path), "num_images": len(features.index), "pixels_sha256": features.fingerprint()}


@ends_in_one_line(smaller="--batch_size")
def main() -> None:
    args = parse_arguments()
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    state, device = start(args.device)
    protocol = GenerationProtocol.load(args.protocol)
    of_images = Protocol.load(protocol.images)
    size = of_images.image_size or args.image_size
    if of_images.image_size and args.image_size not in (None, of_images.image_size):
        raise ValueError(f"--image_size is {args.image_size}, but {protocol.name} is for {of_images.image_size} px.")
    files, made_by = sample_files(args.samples)
    files = {"samples": files}
    files |= {name: find_images(path) for name, path in (("real", args.real), ("training", args.train_data)) if path}
    networks, reasons, hashes = load_networks(
        of_images,
        device,
        args.inception_weights,
        args.feature_encoder,
        args.reference_statistics,
        names=[] if args.no_inception else ["rfid"],
    )
    if not networks.frechet:
        raise ValueError(f"There are no features to compare: Inception's {reasons['rfid']}. Or pass --feature_encoder.")
    settings = {"networks": hashes, "image_size": size, "batch_size": args.batch_size, "device": str(device)}
    settings |= {"num_processes": state.num_processes, "versions": library_versions(), "code_sha256": code_hash()}
    if state.is_main_process:
        remove_results(args.output_dir)
    workers = args.num_workers if args.num_workers is not None else 8 * (device.type == "cuda")
    images, sets = {}, {}
    for name, found in files.items():
        images[name] = CroppedImages(dataset_of_files(found), of_images, size)
        sets[name] = ImageFeatures(of_images, networks)
        evaluate(
            sets[name], images[name], lambda pixels: (pixels, None, {}), args.batch_size, workers, device,
            args.output_dir / f"progress-{name}-{state.process_index}-of-{state.num_processes}.pt",
            progress_key(found, settings, asdict(of_images)), description=f"Features of {name}",
        )  # fmt: skip
        if sets[name].size != sets["samples"].size:
            raise ValueError(different_sizes(sets["samples"].size, sets[name].size))
    if state.is_main_process:
        result, warnings = judge(sets, networks, protocol, device)
        if "rfid" in reasons and not args.no_inception:
            result["metrics"] |= dict.fromkeys(OF_INCEPTION)
            result["not_computed"] |= dict.fromkeys(OF_INCEPTION, reasons["rfid"])
        warnings += [
            f"Not as the protocol asks: {text}." for text in departures(protocol, made_by, len(files["samples"]))
        ]
        neighbours = distances = found = None
        if args.train_data:
            name = next((name for name in networks.frechet if name != "rfid"), "rfid")
            neighbours, more, distances, found = memorised(sets, name, device)
            warnings += more
        result = {
            "schema_version": 1,
            **result,
            "neighbours": neighbours,
            "warnings": warnings,
            "protocol": asdict(protocol) | {"images": asdict(of_images)},
            "source": {"samples": str(args.samples), "made_by": made_by},
            "data": _described(args.real, sets.get("real")),
            "training_data": _described(args.train_data, sets.get("training")),
            "reference_statistics": args.reference_statistics,
            **settings,
            "skipped_images": [error for features in sets.values() for _, error in features.skipped],
            "started": started,
            "seconds": round(sum(features.seconds for features in sets.values()), 1),
        }
        write_report(args.output_dir, result, images, sets, distances, found)
    state.wait_for_everyone()
    if state.is_main_process:
        remove_progress(args.output_dir)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
