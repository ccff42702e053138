"""Gives flat colours codes of their own, in place of codes that images hardly use.

    python -m checkpoints.flat_codes --model_name_or_path runs/half --data runs/images/train.txt \\
        --output_dir checkpoints/vqrae-dinov2-small

A flat picture is one code again and again, and photographs have few saturated colours: where no code is near one, the
whole picture comes back in another colour. Colours evenly spaced in the cube of red, green and blue are encoded, and
the mean latent of each takes the place of one of the codes that are rarest in --data: their rows of SimVQ's frozen
codebook become W^-1 (latent - b). All other codes stay, so tokens change only where such a colour is nearer.

Then the decoder, which has never seen these codes, learns for --steps to paint images as it did from the tokens that
they had before, and flat pictures in their colour. Nothing else is trained.
"""

import copy
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from convert.float16 import check_folders, renamed
from eval.commands import CommandParser, ends_in_one_line
from eval.files import write_folder_whole
from eval.options import whole_number
from modeling_simvq import ImageTokenizer
from quantization_simvq import SimVQ
from reading.images import decode_image
from reading.models import load_pretrained, load_processor
from reading.sources import load_images
from training.data import sample_indices
from training.losses import gradient_loss


ROWS = "quantizer.embedding.weight"
SIDE = 14  # of the grid of tokens of a flat picture, of which there is nothing more to see
NOTE = (
    "\n{colours:,} of the {codes:,} codes are of flat colours, in place of those that were rarest in {images:,} images "
    "to train on, with {share:.2%} of their tokens (`python -m checkpoints.flat_codes`).{taught}\n"
)
TAUGHT = (
    " In {steps:,} steps the decoder then learned to paint these images from the new tokens as it had from the old "
    "ones, and flat pictures."
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
    return torch.cat(means).clone()  # a tensor of inference mode takes no part in training


@torch.inference_mode()
def latents_of_images(model: ImageTokenizer, data: str, max_images: int) -> torch.Tensor:
    """Of images drawn by a seed: (N, h * w, latent_size), in half precision."""
    processor = load_processor(model.name_or_path, model.config.image_size)
    images = load_images(data)
    images = images.select(sample_indices(len(images), min(max_images, len(images)), seed=0))
    latents = []
    for record in tqdm(images["image"], desc="Encoding", unit="image"):
        pixels = processor(decode_image(record), return_tensors="pt").pixel_values
        latents.append(model.get_latents(pixels).half())
    return torch.cat(latents).clone()


@torch.no_grad()
def tokens_of(model: ImageTokenizer, latents: torch.Tensor) -> torch.Tensor:
    """(N, h * w, latent_size) -> (N, h, w), of square images."""
    parts = tqdm(latents.split(8), desc="Tokens", unit="batch", leave=False)
    tokens = torch.cat([model.quantizer(part.float())[2] for part in parts])
    side = int(latents.shape[1] ** 0.5)
    return tokens.view(len(latents), side, side)


@torch.no_grad()
def rows_of(quantizer: SimVQ, latents: torch.Tensor) -> torch.Tensor:
    """The rows c of the frozen codebook whose codes W c + b are `latents` (N, dim): float32."""
    weight, bias = quantizer.embedding_proj.weight.double(), quantizer.embedding_proj.bias.double()
    return torch.linalg.solve(weight, (latents.double() - bias).T).T.float()


def teach(
    model: ImageTokenizer,
    before: ImageTokenizer,
    tokens: torch.Tensor,
    old_tokens: torch.Tensor,
    colours: torch.Tensor,
    codes: torch.Tensor,
    steps: int,
) -> None:
    """Trains the decoder of `model` by AdamW at 2e-4, falling to zero, on batches of three images and two flat
    pictures, on mean absolute errors of pixels and of their differences.

    Args:
        before: the model as it was, which paints what `model` is to paint.
        tokens, old_tokens: of images, (N, h, w), by the new and the old codes.
        colours, codes: (M, 3) in [0, 1], and the code of each.
    """
    parameters = list(model.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, 2e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in tqdm(range(steps), desc="Teaching the decoder", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = 2e-4 * min(1, (step + 1) / 20) * (1 - step / steps)
        images = torch.randint(len(tokens), (3,), generator=generator)
        flat = torch.randint(len(colours), (2,), generator=generator)
        with torch.no_grad():
            target = before.decode(old_tokens[images]).decoded_pixel_values
        target = torch.cat([target, colours[flat][:, :, None, None].expand(-1, -1, *target.shape[2:])])
        batch = torch.cat([tokens[images], codes[flat][:, None, None].expand(-1, *tokens.shape[1:])])
        made = model.decode(batch).decoded_pixel_values
        loss = F.l1_loss(made, target) + gradient_loss(made, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def replace(source: Path, output: Path, data: str, levels: int, max_images: int, steps: int) -> float:
    """Writes the folder; returns the share of the tokens of images that the replaced codes had."""
    before = load_pretrained(str(source), {}).eval()
    if not isinstance(before.quantizer, SimVQ):
        raise ValueError(f"{source} has a codebook that is trained itself; only SimVQ's is frozen.")
    colours = lattice(levels)
    if len(colours) > before.config.codebook_size // 2:
        raise ValueError(f"--levels {levels}: {len(colours):,} colours are more than half of the codes.")
    latents = latents_of_images(before, data, max_images)
    old_tokens = tokens_of(before, latents)
    counts = torch.bincount(old_tokens.flatten(), minlength=before.config.codebook_size)
    rarest = counts.argsort(stable=True)[: len(colours)]
    share = (counts[rarest].sum() / counts.sum()).item()
    with safe_open(source / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source / "model.safetensors")
    rows = rows_of(before.quantizer, latents_of_colours(before, colours)).to(tensors[ROWS].dtype)
    tensors[ROWS][rarest] = rows
    model = copy.deepcopy(before)
    model.quantizer.embedding.weight[rarest] = rows.float()
    if steps:
        teach(model, before, tokens_of(model, latents), old_tokens, colours, rarest, steps)
        for name, tensor in model.decoder.state_dict().items():
            tensors[f"decoder.{name}"] = tensor.to(tensors[f"decoder.{name}"].dtype).contiguous()

    def write(folder: Path) -> None:
        shutil.copytree(source, folder)
        save_file(tensors, folder / "model.safetensors", metadata=metadata)
        if (folder / "README.md").exists():
            card = ModelCard.load(folder / "README.md")
            card.data.eval_results = None  # of other weights
            head, heading, rest = card.text.partition("\n## Training\n")
            sizes = {"colours": len(colours), "codes": len(counts), "images": len(latents)}
            taught = TAUGHT.format(steps=steps) if steps else " The decoder has not seen them."
            card.text = f"{head}{NOTE.format(**sizes, share=share, taught=taught)}{heading}{rest}"
            card.text = renamed(card.text, source.name, output.name)
            (folder / "README.md").write_text(str(card))

    write_folder_whole(output, write)
    return share


parser = CommandParser(__doc__)
parser.add_argument("--model_name_or_path", required=True, type=Path, help="Folder of a trained tokenizer.")
parser.add_argument("--data", required=True, help="Images whose tokens are counted, see docs/data.md.")
parser.add_argument("--max_images", type=whole_number(), default=700, help="Of these, at most (default: 700).")
parser.add_argument("--levels", type=whole_number(), default=12, help="Of red, green and blue (default: 12).")
parser.add_argument("--steps", type=whole_number(0), default=200, help="Of the decoder (default: 200).")
parser.add_argument("--output_dir", required=True, type=Path, help="A new folder.")


@ends_in_one_line()
def main() -> None:
    args = parser.parse_args()
    check_folders(parser, args)
    transformers.logging.set_verbosity_error()
    share = replace(args.model_name_or_path, args.output_dir, args.data, args.levels, args.max_images, args.steps)
    print(
        f"{args.output_dir}: {args.levels**3:,} codes are of flat colours; those that they replace had {share:.2%} of "
        "the tokens of these images."
    )


if __name__ == "__main__":
    main()
