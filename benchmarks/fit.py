#!/usr/bin/env python
"""What it costs to fit fused latents, codes and the linear path, beside the encoder and beside faiss.

    python -m benchmarks.fit --encoder DINOV2_SMALL --data images

fit     `initialize_codebook` on images in memory, in seconds and as a multiple of the encoder's forward over the same
        images; the row of --config (configs/fused_latents.json) says what is fitted.
k-means ours beside faiss-cpu's (needs `pip install faiss-cpu`) on a sample of the latents just fitted, the same rounds:
        seconds, and the mean squared distance of all latents to their nearest centroid.
"""

import json
from pathlib import Path

import torch

from benchmarks.fused_latents import CONFIG, choice_of, read
from benchmarks.measuring import now, timed
from eval.commands import CommandParser, ends_in_one_line
from eval.options import present_device, whole_number
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from quantization_simvq import kmeans, nearest_codes


def objective(samples: torch.Tensor, centroids: torch.Tensor) -> float:
    """Mean squared distance of samples (N, dim) to the nearest of the centroids (K, dim)."""
    mean = centroids.mean(0)
    centered = centroids - mean
    nearest = nearest_codes(samples, centered, centered.square().sum(1) / 2, mean)
    return (samples - centroids[nearest]).square().sum(1).mean().item()


def by_faiss(samples: torch.Tensor, codes: int, rounds: int) -> torch.Tensor:
    """Centroids (codes, dim) of faiss's Lloyd iterations, of all samples."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    search = faiss.Kmeans(
        samples.shape[1], codes, niter=rounds, seed=0, min_points_per_centroid=1, max_points_per_centroid=len(samples)
    )
    search.train(samples.numpy())
    return torch.from_numpy(search.centroids)


parser = CommandParser(__doc__)
parser.add_argument("--encoder", required=True, help="A pretrained vision encoder (hub or folder).")
parser.add_argument("--data", required=True, help="Images to fit to: a folder, or a .txt file that lists them.")
parser.add_argument("--config", type=Path, default=CONFIG, help="Where rows are (default: configs/fused_latents.json).")
parser.add_argument("--row", default="weight 4", help="What to fit (default: 'weight 4').")
parser.add_argument("--images", type=whole_number(), default=400, help="How many, drawn by a seed (default: 400).")
parser.add_argument("--rounds", type=whole_number(), default=8, help="Of k-means (default: 8, as the fit).")
parser.add_argument("--latents_per_code", type=whole_number(), default=32, help="For k-means (default: 32).")
parser.add_argument("--device", type=present_device, default="cpu", help="cpu (default) or cuda.")


@ends_in_one_line()
@torch.no_grad()
def main() -> None:
    args = parser.parse_args()
    settings = json.loads(args.config.read_text())
    if args.row not in settings["rows"]:
        raise ValueError(f"--row: {args.config} has no row '{args.row}', only {', '.join(settings['rows'])}.")
    fields, _ = choice_of(settings, args.row)
    processor = VQRAEImageProcessor.for_image_size(fields["image_size"])
    batches = read(args.data, processor, args.images)[0].split(16)
    torch.manual_seed(0)
    model = VQRAEModel.from_encoder_pretrained(args.encoder, **fields).eval().to(args.device)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} CPU threads, {args.row}: {fields}")

    def forward() -> None:
        for batch in batches:
            model.get_image_features(batch.to(args.device))

    print("Timing the encoder, then the fit.", flush=True)
    model.get_image_features(batches[0].to(args.device))  # the first call is not like the others
    encoder = timed(forward, args.device)
    fit = timed(lambda: model.initialize_codebook(batches, latents_per_code=args.latents_per_code), args.device)
    images = sum(map(len, batches))
    print(
        f"encoder {encoder:.1f} s, fit {fit:.1f} s of {images} images: {fit / encoder:.2f} times the encoder's forward"
    )

    latents = torch.cat([model.get_latents(batch.to(args.device)).flatten(0, 1).float() for batch in batches])
    codes = fields["codebook_size"]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(latents), generator=generator)[: codes * args.latents_per_code]
    latents = latents[chosen.to(latents.device)]
    ways = {"ours": lambda: kmeans(latents, codes, args.rounds, torch.Generator().manual_seed(0))}
    try:
        import faiss  # noqa: F401
    except ImportError:
        print("faiss is not installed: pip install faiss-cpu")
    else:
        ways["faiss"] = lambda: by_faiss(latents.cpu(), codes, args.rounds).to(latents.device)
    for name, way in ways.items():
        print(f"k-means: {name}", flush=True)
        start = now(args.device)
        centroids = way()
        spent = now(args.device) - start
        print(
            f"k-means, {codes:,} codes of {len(latents):,} latents x {latents.shape[1]}, {args.rounds} rounds: {name} "
            f"{spent:.1f} s, objective {objective(latents, centroids):.5f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
