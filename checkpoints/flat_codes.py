"""Gives flat colours codes of their own, in place of codes that images hardly use. Nothing is trained.

    python -m checkpoints.flat_codes --model_name_or_path runs/half --data runs/images/train.txt \\
        --output_dir checkpoints/vqrae-dinov2-small

A flat picture is one code again and again, and photographs have few saturated colours: where no code is near one, the
whole picture comes back in another colour. Colours evenly spaced in the cube of red, green and blue are encoded, and
the mean latent of each takes the place of one of the codes that are rarest in --data: their rows of SimVQ's frozen
codebook become W^-1 (latent - b). All other codes stay, so tokens change only where such a colour is nearer.
"""

import shutil
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from eval.commands import CommandParser, ends_in_one_line
from eval.files import write_folder_whole
from eval.options import whole_number
from modeling_simvq import ImageTokenizer
from quantization_simvq import SimVQ
from reading.images import decode_image
from reading.models import load_pretrained, load_processor
from reading.sources import load_images
from training.data import sample_indices


ROWS = "quantizer.embedding.weight"
SIDE = 14  # of the grid of tokens of a flat picture, of which there is nothing more to see
NOTE = (
    "\n{colours:,} of the {codes:,} codes are of flat colours, in place of those that were rarest in {images:,} images "
    "to train on, with {share:.2%} of their tokens (`python -m checkpoints.flat_codes`).\n"
)


def lattice(levels: int) -> torch.Tensor:
    """Colours in the middles of `levels` ** 3 equal cubes: (levels ** 3, 3), in [0, 1]."""
    middles = (torch.arange(levels) + 0.5) / levels
    return torch.cartesian_prod(middles, middles, middles)


@torch.inference_mode()
def latents_of_colours(model: ImageTokenizer, colours: torch.Tensor, batch_size: int = 16) -> torch.Tensor:
    """(N, 3) in [0, 1] -> (N, latent_size): the mean over the tokens of a flat picture."""
    side, means = SIDE * model.config.decoder_patch_size, []
    with tqdm(total=len(colours), desc="Flat colours", unit="colour") as bar:
        for part in colours.split(batch_size):
            pictures = part[:, :, None, None].expand(-1, -1, side, side).contiguous()
            means.append(model.get_latents(pictures).float().mean(1))
            bar.update(len(part))
    return torch.cat(means)


@torch.inference_mode()
def counts_of(model: ImageTokenizer, data: str, max_images: int) -> tuple[torch.Tensor, int]:
    """Tokens of each code in images drawn by a seed, and the number of these images."""
    processor = load_processor(model.name_or_path, model.config.image_size)
    images = load_images(data)
    images = images.select(sample_indices(len(images), min(max_images, len(images)), seed=0))
    counts = torch.zeros(model.config.codebook_size, dtype=torch.int64)
    for record in tqdm(images["image"], desc="Counting codes", unit="image"):
        pixels = processor(decode_image(record), return_tensors="pt").pixel_values
        counts += torch.bincount(model.get_image_tokens(pixels).flatten(), minlength=len(counts))
    return counts, len(images)


@torch.no_grad()
def rows_of(quantizer: SimVQ, latents: torch.Tensor) -> torch.Tensor:
    """The rows c of the frozen codebook whose codes W c + b are `latents` (N, dim): float32."""
    weight, bias = quantizer.embedding_proj.weight.double(), quantizer.embedding_proj.bias.double()
    return torch.linalg.solve(weight, (latents.double() - bias).T).T.float()


def replace(source: Path, output: Path, data: str, levels: int, max_images: int) -> float:
    """Writes the folder; returns the share of the tokens of images that the replaced codes had."""
    model = load_pretrained(str(source), {}).eval()
    if not isinstance(model.quantizer, SimVQ):
        raise ValueError(f"{source} has a codebook that is trained itself; only SimVQ's is frozen.")
    colours = lattice(levels)
    if len(colours) > model.config.codebook_size // 2:
        raise ValueError(f"--levels {levels}: {len(colours):,} colours are more than half of the codes.")
    counts, images = counts_of(model, data, max_images)
    rarest = counts.argsort(stable=True)[: len(colours)]
    share = (counts[rarest].sum() / counts.sum()).item()
    rows = rows_of(model.quantizer, latents_of_colours(model, colours))

    def write(folder: Path) -> None:
        shutil.copytree(source, folder)
        with safe_open(source / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        tensors = load_file(source / "model.safetensors")
        tensors[ROWS][rarest] = rows.to(tensors[ROWS].dtype)
        save_file(tensors, folder / "model.safetensors", metadata=metadata)
        if (folder / "README.md").exists():
            card = ModelCard.load(folder / "README.md")
            card.data.eval_results = None  # of other weights
            before, heading, rest = card.text.partition("\n## Training\n")
            sizes = {"colours": len(colours), "codes": len(counts), "images": images, "share": share}
            card.text = f"{before}{NOTE.format(**sizes)}{heading}{rest}"
            card.text = card.text.replace(f"# {source.name}\n", f"# {output.name}\n").replace(
                f'from_pretrained("{source.name}"', f'from_pretrained("{output.name}"'
            )
            (folder / "README.md").write_text(str(card))

    write_folder_whole(output, write)
    return share


parser = CommandParser(__doc__)
parser.add_argument("--model_name_or_path", required=True, type=Path, help="Folder of a trained tokenizer.")
parser.add_argument("--data", required=True, help="Images whose tokens are counted, see docs/data.md.")
parser.add_argument("--max_images", type=whole_number(), default=700, help="Of these, at most (default: 700).")
parser.add_argument("--levels", type=whole_number(), default=12, help="Of red, green and blue (default: 12).")
parser.add_argument("--output_dir", required=True, type=Path, help="A new folder.")


@ends_in_one_line()
def main() -> None:
    args = parser.parse_args()
    if not (args.model_name_or_path / "model.safetensors").is_file():
        parser.error(f"--model_name_or_path: {args.model_name_or_path} has no model.safetensors")
    if args.output_dir.exists():
        parser.error(f"--output_dir {args.output_dir} exists: remove it or choose another")
    transformers.logging.set_verbosity_error()
    share = replace(args.model_name_or_path, args.output_dir, args.data, args.levels, args.max_images)
    print(
        f"{args.output_dir}: {args.levels**3:,} codes are of flat colours; those that they replace had {share:.2%} of "
        "the tokens of these images."
    )


if __name__ == "__main__":
    main()
