#!/usr/bin/env python
"""Measures how well a tokenizer reconstructs images, under a named protocol.

    python -m eval.reconstruction --model_name_or_path runs/quickstart --data my_images --output_dir results
    python -m eval.reconstruction --model_name_or_path org/model --data ILSVRC/imagenet-1k --protocol titok-256 \\
        --output_dir results
    python -m eval.reconstruction --callable their_code:reconstruct --data my_images --image_size 256 \\
        --output_dir results
    python -m eval.reconstruction --real originals --fake reconstructions --output_dir results

A tokenizer of this repository (or one with its methods), any function from pixels to pixels, or two folders of images:
rFID, LPIPS, PSNR, SSIM, MS-SSIM, blocking, flat colours, use of the codebook, semantic agreement, as far as the
protocol has them. Protocols are the files of eval/protocols; docs/evaluation.md tells where they come from and how far
apart they are.

Writes results.json (every number with all that it depends on), results.md, report.html (numbers, pictures, error maps,
use of the codes), pictures.png and, where there are tokens, code_counts.npy. An interrupted run goes on when the same
command is given again. `accelerate launch -m eval.reconstruction ...` shares the images among processes and gives the
same numbers.
"""

import argparse
import hashlib
import json
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import set_seed

from eval.batches import load_batches
from eval.commands import CommandParser, ends_in_one_line
from eval.crops import CroppedImages
from eval.evaluation import Evaluation
from eval.files import write_whole
from eval.flat_colours import measure_flat_colours
from eval.image_features import ImageFeatures
from eval.metrics import to_uint8
from eval.networks import load_networks, load_object, source_hash, weights_hash
from eval.options import add_source_options, present_device, whole_number
from eval.protocol import Protocol, names
from eval.results import (
    check_model_card,
    code_hash,
    library_versions,
    remove_results,
    update_model_card,
    write_results,
)
from eval.seen_images import seen_images
from eval.semantic_agreement.semantic_agreement import cosine_per_image
from reading.files import dataset_of_files, match_images
from reading.images import shown_path
from reading.models import exact_float32, load_any
from reading.sources import find_source, load_images
from reading.wording import counted, one_of_processes


class ModelReconstruction:
    """A tokenizer with the methods and outputs of [`ImageTokenizer`], as the evaluation calls it.

    Args:
        model: in eval mode.
        semantic_agreement: also the cosine of its features of original and reconstruction.
        reference: a tokenizer whose continuous features are the original ones: also the cosine to them.
    """

    def __init__(self, model, semantic_agreement: bool, reference=None) -> None:
        self.model, self.semantic_agreement, self.reference = model, semantic_agreement, reference
        self._finite = None  # (B,), whether all latents of an image of the latest batch are

        def look_at_latents(quantizer, args) -> None:
            self._finite = args[0].isfinite().flatten(1).all(1)

        if hasattr(model, "quantizer"):
            model.quantizer.register_forward_pre_hook(look_at_latents)

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """(B, 3, H, W) in [0, 1] -> reconstructions, tokens, and scores by name, (B,) each. Where latents are not
        finite, and so tokens mean nothing, the reconstruction is NaN."""
        self._finite = None
        try:
            reconstructions, tokens, scores = self._reconstruct(pixels)
        except ValueError:  # of a whole batch, over one image
            finite = self._finite
            if finite is None or finite.all():
                raise
            if not finite.any():
                return torch.full_like(pixels, float("nan")), None, {}
            parts = self._reconstruct(pixels[finite])

            def among_all(part: torch.Tensor) -> torch.Tensor:
                whole = part.new_zeros(len(pixels), *part.shape[1:])
                whole[finite] = part
                return whole

            reconstructions, tokens = map(among_all, parts[:2])
            scores = {name: among_all(values) for name, values in parts[2].items()}
            self._finite = finite
        if self._finite is not None:
            reconstructions = reconstructions.masked_fill(~self._finite.view(-1, 1, 1, 1), float("nan"))
        return reconstructions, tokens, scores

    def _reconstruct(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        output = self.model(pixels, return_loss=False)
        reconstructions, scores = output.decoded_pixel_values, {}
        if self.semantic_agreement:
            seen = self.model.get_image_features(to_uint8(reconstructions) / 255).last_hidden_state
            scores["semantic_agreement"] = cosine_per_image(seen, output.last_hidden_state)
        if self.reference is not None:
            features = self.reference.get_image_features(pixels).last_hidden_state
            scores["feature_cosine"] = cosine_per_image(output.last_hidden_state, features)
        return reconstructions, output.image_tokens, scores


def start(device: torch.device | None) -> tuple[PartialState, torch.device]:
    """The processes of an evaluation, and the device of this one: `device`, or the best there is. It computes in
    float32, and nothing is drawn but by a foreign tokenizer, from seed 0."""
    on_cpu = device is not None and device.type == "cpu"
    state = PartialState(cpu=on_cpu or not torch.cuda.is_available())
    set_seed(0)
    exact_float32()
    return state, device or state.device


def progress_key(files: list[Path], *settings) -> str:
    """SHA-256 of what the numbers depend on: files by name, size and date, and settings that JSON can hold."""
    listed = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([settings, listed], sort_keys=True).encode()).hexdigest()


def remove_progress(output: Path) -> None:
    """Removes what an evaluation has saved for its resumption, also after a kill or by another number of processes."""
    for file in output.glob("*progress-*-of-*.pt*"):
        file.unlink(missing_ok=True)


def read_progress(file: Path) -> dict | None:
    """What an interrupted `evaluate` left, if there is something that can be read."""
    if not file.exists():
        return None
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever a file brings up that was cut short, as on a disk that was full
        print(f"{file} cannot be read: starting anew.", flush=True)
        return None


def evaluate(
    evaluation: Evaluation | ImageFeatures,
    images: CroppedImages,
    reconstruct,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    progress_file: Path,
    key: str,
    save_seconds: float = 120,
    description: str = "Evaluating",
) -> None:
    """Passes all images through, each by one process, and joins the processes; what was done before an interruption is
    not done again. The progress stays in its file, for the caller to remove when the results are written.

    Args:
        evaluation: takes the batches: an [`Evaluation`], or [`ImageFeatures`].
        images: of the data; with `reconstruction` where `reconstruct` is `None`.
        reconstruct: from (B, 3, H, W) pixels in [0, 1] to reconstructions, tokens or `None`, and scores by name.
        batch_size: in images.
        num_workers: processes that load images.
        device: where the tokenizer and the networks are.
        progress_file: of this process.
        key: of everything the numbers depend on; progress under another key is not used.
        save_seconds: between two savings.
        description: beside the bar.
    """
    state = PartialState()
    batches = [list(range(i, min(i + batch_size, len(images)))) for i in range(0, len(images), batch_size)]
    own = list(range(len(batches)))[state.process_index :: state.num_processes]
    done, progress = 0, read_progress(progress_file)
    if progress and progress["key"] == key:
        done = progress["done"]
        evaluation.load_state_dict(progress["evaluation"], device)
        print(f"Going on after {counted(len(evaluation.index), 'image')} ({progress_file}).", flush=True)
    elif progress:
        print(f"{progress_file} is of another evaluation: starting anew.", flush=True)
    loader = load_batches(images, [batches[i] for i in own[done:]], num_workers)
    start = saved = time.monotonic()
    before = evaluation.seconds

    def save() -> None:
        evaluation.seconds = before + time.monotonic() - start
        progress = {"key": key, "done": done, "evaluation": evaluation.state_dict()}
        write_whole(progress_file, lambda path: torch.save(progress, path))

    total = sum(len(batches[i]) for i in own)
    bar = tqdm(
        total=total,
        initial=sum(len(batches[i]) for i in own[:done]),
        desc=one_of_processes(description, state.num_processes),
        unit="image",
        disable=not state.is_main_process,
    )
    with bar, torch.inference_mode():
        for number, batch in zip(own[done:], loader):
            for index, error in batch["skipped"]:
                tqdm.write(f"Left out: {error}")
                evaluation.skipped.append((index, error))
            if batch["index"]:
                originals, tokens, scores = batch["original"].to(device), None, {}
                if reconstruct is None:
                    reconstructions = batch["reconstruction"].to(device) / 255
                else:
                    reconstructions, tokens, scores = reconstruct(originals / 255)
                left_out = evaluation.update(number, batch["index"], originals, reconstructions, tokens, **scores)
                for index in left_out:
                    name = shown_path(images.data[index]["image"]) or f"image {index}"
                    error = f"{name}: its latents, features or reconstruction hold NaN or infinity."
                    tqdm.write(f"Left out: {error}")
                    evaluation.skipped.append((index, error))
            done += 1
            bar.update(len(batches[number]))
            if time.monotonic() - saved > save_seconds:
                save()
                saved = time.monotonic()
    save()
    evaluation.join()


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    what = parser.add_argument_group("what is evaluated: one of")
    what.add_argument("--model_name_or_path", help="A tokenizer: folder or hub repository.")
    what.add_argument(
        "--callable",
        help="module:function from pixels (B, 3, H, W) in [0, 1] to pixels; its module must be in PYTHONPATH.",
    )
    what.add_argument("--real", help="A folder of originals (or a .txt file that lists them), with --fake.")
    what.add_argument("--fake", help="A folder of reconstructions, named like their originals.")
    parser.add_argument("--revision", help="Branch, tag or commit of a hub repository.")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="Run the modeling code that comes with a foreign checkpoint."
    )
    data = parser.add_argument_group("on which images")
    add_source_options(data, split="validation")
    data.add_argument("--max_samples", type=whole_number(), help="Evaluate on the first so many images.")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--protocol", default="default", help=f"One of {', '.join(names())} (default: default), or a .json file."
    )
    how.add_argument(
        "--image_size",
        type=whole_number(),
        help="Side of the crops, where neither protocol nor model says. Without: no crop.",
    )
    how.add_argument(
        "--batch_size", type=whole_number(), default=32, help="Images at a time (default: 32, or the protocol's)."
    )
    how.add_argument(
        "--num_workers", type=whole_number(0), help="Processes that load images (default: 8 beside a GPU, else 0)."
    )
    how.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="What the model computes in."
    )
    how.add_argument("--device", type=present_device, help="Default: cuda where there is one.")
    metrics = parser.add_argument_group("metrics")
    metrics.add_argument(
        "--network_metrics",
        nargs="*",
        choices=["rfid", "lpips_alex", "lpips_vgg"],
        help="Metrics that need pretrained networks, hundreds of MB to download once (default: all of the protocol). "
        "Nothing behind the flag: none.",
    )
    metrics.add_argument("--inception_weights", help="Local file with torch-fidelity's Inception weights, for rFID.")
    metrics.add_argument(
        "--reference_statistics",
        help="An .npz file with mu and sigma of the reference set, for rFID against it (eval/reference_statistics.py).",
    )
    metrics.add_argument(
        "--features",
        nargs="*",
        default=[],
        help="Frechet distances on other features: vision models of transformers, such as facebook/dinov2-large, or "
        "module:function from (B, 3, H, W) of uint8 to (B, D). Named fd_..., never FID.",
    )
    metrics.add_argument(
        "--reference_model",
        help="A tokenizer with the original encoder, such as that of stage 1: feature_cosine is the cosine similarity "
        "of the continuous features to its.",
    )
    parser.add_argument("--output_dir", required=True, help="Where the results go.")
    parser.add_argument(
        "--update_model_card",
        action="store_true",
        help="Put the numbers into the metadata (model-index) of the model's README.md: in its folder, or on the hub, "
        "there on the branch of --revision.",
    )
    args = parser.parse_args()
    sources = [args.model_name_or_path, args.callable, args.real]
    if sum(source is not None for source in sources) != 1 or (args.real is None) != (args.fake is None):
        parser.error("pass one of --model_name_or_path, --callable, and --real with --fake")
    if (args.data is None) == (args.real is None):
        parser.error("pass --data with a tokenizer, and none with --real and --fake")
    if not args.model_name_or_path and (args.revision or args.reference_model or args.dtype != "float32"):
        parser.error("--revision, --reference_model and --dtype are for --model_name_or_path")
    if args.callable and args.image_size is None and Protocol.load(args.protocol).image_size is None:
        parser.error("--callable needs --image_size, or a protocol that has one")
    if args.update_model_card and not args.model_name_or_path:
        parser.error("--update_model_card needs --model_name_or_path")
    return args


def main() -> None:
    args = parse_arguments()
    state, device = start(args.device)
    protocol = Protocol.load(args.protocol)
    if args.update_model_card:
        check_model_card(args.model_name_or_path, args.revision)
    output = Path(args.output_dir)

    size, reconstruct, fakes = protocol.image_size or args.image_size, None, None
    codebook_size = patch_size = None
    if protocol.image_size and args.image_size not in (None, protocol.image_size):
        raise ValueError(f"--image_size is {args.image_size}, but {protocol.name} is for {protocol.image_size} px.")
    if args.real:
        source = {"real": args.real, "fake": args.fake}
        real_files, fake_files = match_images(args.real, args.fake)
        data, fakes = dataset_of_files(real_files), dataset_of_files(fake_files)
        files, split = [*real_files, *fake_files], None
    else:
        found = find_source(args.data)
        files, split = found.images, found.split(args.split)
        options = {"config_name": args.dataset_config_name, "image_column": args.image_column}
        with ends_in_one_line(ValueError):  # such as a split that it does not have
            data = load_images(found, args.split, **options)
    if args.callable:
        function = load_object(args.callable)
        source = {"callable": args.callable, "source_sha256": source_hash(function)}

        def reconstruct(pixels):
            result = function(pixels)
            if not isinstance(result, torch.Tensor):
                raise ValueError(
                    f"{args.callable} gave a {type(result).__name__}: it must give a tensor like its pixels."
                )
            return result, None, {}

    if args.model_name_or_path:
        trust = args.trust_remote_code
        if state.is_main_process:
            print(f"Loading the tokenizer {args.model_name_or_path} (downloaded if it is not here).", flush=True)
        model = load_any(args.model_name_or_path, getattr(torch, args.dtype), trust, args.revision).to(device)
        reference = load_any(args.reference_model, torch.float32, trust).to(device) if args.reference_model else None
        size = size or model.config.image_size
        codebook_size, patch_size = model.config.codebook_size, getattr(model.config, "decoder_patch_size", None)
        if patch_size and size % patch_size:
            raise ValueError(
                f"The images would be of {size} px (--image_size, or the protocol's): {args.model_name_or_path} takes "
                f"multiples of {patch_size} px, such as {size // patch_size * patch_size or patch_size}."
            )
        if state.is_main_process and (said := seen_images(args.model_name_or_path, files)):
            print(said, flush=True)
        reconstruct = ModelReconstruction(model, protocol.semantic_agreement, reference)
        source = {
            "model": args.model_name_or_path,
            "revision": getattr(model.config, "_commit_hash", None) or args.revision,
            "weights_sha256": weights_hash(model),
            "config_sha256": hashlib.sha256(model.config.to_json_string(use_diff=False).encode()).hexdigest(),
            "dtype": args.dtype,
            "codebook_size": codebook_size,
            "reference_model": args.reference_model,
            "reference_sha256": weights_hash(reference) if reference is not None else None,
        }
    if args.max_samples:
        data = data.select(range(min(len(data), args.max_samples)))
    networks, reasons, hashes = load_networks(
        protocol,
        device,
        names=args.network_metrics,
        inception_weights=args.inception_weights,
        features=args.features,
        reference_statistics=args.reference_statistics,
    )

    batch_size = protocol.batch_size or args.batch_size
    settings = {"protocol": vars(protocol), "image_size": size, "source": source, "networks": hashes}
    settings |= {"reference_statistics": args.reference_statistics, "batch_size": batch_size}
    settings |= {"num_processes": state.num_processes, "device": str(device), "versions": library_versions()}
    settings |= {"code_sha256": code_hash()}
    key = progress_key(files, settings, args.features, args.max_samples, None if files else data._fingerprint)
    images = CroppedImages(data, protocol, size, fakes)
    evaluation = Evaluation(protocol, networks, codebook_size, patch_size)
    workers = args.num_workers if args.num_workers is not None else 8 * (device.type == "cuda")
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    progress_file = output / f"progress-{state.process_index}-of-{state.num_processes}.pt"
    if state.is_main_process:
        remove_results(output)
    evaluate(evaluation, images, reconstruct, batch_size, workers, device, progress_file, key)
    if state.is_main_process:
        print(f"Computing the metrics of {counted(len(evaluation.index), 'image')}.", flush=True)
        metrics, not_computed, warnings = evaluation.compute()
        if args.model_name_or_path and protocol.flat_colours:
            print("Reconstructing images of one colour, which flat_colours of the protocol asks for.", flush=True)
            pixels_alone = ModelReconstruction(model, semantic_agreement=False)  # their scores would be thrown away
            flat, why = measure_flat_colours(pixels_alone, protocol, size, batch_size, device)
            metrics, not_computed = metrics | flat, not_computed | why
        print("Drawing some images, and writing the results.", flush=True)
        seconds = evaluation.seconds
        result = {
            "schema_version": 1,
            "metrics": metrics | dict.fromkeys(reasons),
            "not_computed": reasons | not_computed,
            "warnings": warnings,
            "num_images": len(evaluation.index),
            "skipped_images": [error for _, error in evaluation.skipped],
            "num_not_finite": len(evaluation.not_finite),
            **settings,
            "data": {
                "name": args.data or args.real,
                "split": split,
                "config": args.dataset_config_name,
                "pixels_sha256": evaluation.fingerprint(),
            },
            "seed": 0,
            "started": started,
            "seconds": round(seconds, 1),
            "images_per_second": round(len(evaluation.index) / seconds, 2),
        }
        write_results(output, result, evaluation, images, reconstruct, device)
        if args.update_model_card:
            update_model_card(args.model_name_or_path, result, args.revision)
    state.wait_for_everyone()
    progress_file.unlink(missing_ok=True)
    if state.is_main_process:
        remove_progress(output)
    state.destroy_process_group()


if __name__ == "__main__":
    with ends_in_one_line(smaller="--batch_size or --image_size"):
        main()
