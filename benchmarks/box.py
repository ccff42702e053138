"""The tokenizer in the box beside others and beside JPEG and WebP, on the same images, with pictures.

    python -m benchmarks.box --data MY_IMAGES --output_dir runs/box
    python -m benchmarks.box --data MY_IMAGES --output_dir runs/box \\
        --model_name_or_path runs/fused/weight-4--convolution/trained \\
        --others "last layer=runs/fused/last-layer-alone/trained" --train_data runs/images/train.txt --minutes 12

Each image is cropped as the tokenizer in the box needs it. Bytes of a tokenizer are its tokens times the bits that tell
its codes apart, without entropy coding. JPEG and WebP get the highest quality whose whole file, header included, is no
larger than the first tokenizer's; where even the lowest is larger, that one is taken, and its size is shown. --oracle
adds a bound: the linear map from the codes around a token to its patch that least squares finds on these very images.
No decoder that is linear in so many codes has a smaller squared error there. --minutes adds the CNN of the SimVQ paper
with as many codes and tokens, made narrow (32 channels, not 128) for a CPU, and trained so long on --train_images of
--train_data; benchmarks.fused_latents trains others for as many minutes on the same images. LPIPS (VGG) needs
torchvision's VGG16, 528 MB, which is downloaded; without it that column is left out. Writes results.json, table.md and
pictures.png: originals, then a row for each method in the order of the table.
"""

import io
import json
import math
from bisect import bisect_right
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from benchmarks.fused_latents import painted, read, train
from configuration_simvq_gan import SimVQGANConfig
from eval.commands import CommandParser, ends_in_one_line
from eval.files import write_whole
from eval.lpips.lpips import load_lpips
from eval.metrics import to_uint8
from eval.pictures import save_rows
from fitting_simvq import fit_linear_path
from modeling_simvq import ImageTokenizer
from modeling_simvq_gan import SimVQGANModel
from reading.models import load_pretrained, load_processor


BOX = Path(__file__).resolve().parents[1] / "checkpoints" / "vqrae-dinov2-small"
CODECS = {"JPEG": {"format": "JPEG", "optimize": True}, "WebP": {"format": "WEBP", "method": 6}}


def bytes_of_tokens(model: ImageTokenizer, size: int) -> float:
    """Of one image of `size` pixels: its tokens times the bits of a code."""
    return (size // model.config.decoder_patch_size) ** 2 * math.log2(model.config.codebook_size) / 8


def by_codec(image: torch.Tensor, limit: float, **options) -> tuple[torch.Tensor, int]:
    """The highest quality whose file has `limit` bytes at most, or else the lowest.

    Args:
        image: (3, height, width), uint8.
        limit: in bytes.
        options: of Pillow's `save`.

    Returns:
        The decoded image, like `image`, and the bytes of its file.
    """
    picture = to_pil_image(image)

    def coded(quality: int) -> bytes:
        file = io.BytesIO()
        picture.save(file, quality=quality, **options)
        return file.getvalue()

    first_too_large = bisect_right(range(96), limit, key=lambda quality: len(coded(quality)))  # files grow with quality
    content = coded(max(0, first_too_large - 1))
    return pil_to_tensor(Image.open(io.BytesIO(content)).convert("RGB")), len(content)


@torch.no_grad()
def by_tokenizer(model: ImageTokenizer, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, height, width) of uint8 -> the same, from their tokens."""
    made = [
        to_uint8(model.decode(model.get_image_tokens(image[None] / 255)).decoded_pixel_values)
        for image in tqdm(images, desc="Reconstructing", unit="image")
    ]
    return torch.cat(made)


@torch.no_grad()
def by_oracle(model: ImageTokenizer, images: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """(B, 3, height, width) of uint8 -> the same, by the linear map from `kernel_size` x `kernel_size` codes to the
    patch of the middle one that has the smallest squared error on these images."""
    patch_size, maps, samples = model.config.decoder_patch_size, [], []
    for image in tqdm(images, desc=f"Fitting {kernel_size} x {kernel_size} codes", unit="image"):
        pixels = image[None] / 255
        codes = model.quantizer.get_codebook_entry(model.get_image_tokens(pixels)).float()  # 1, h, w, dim
        maps.append(codes.permute(0, 3, 1, 2))
        patches = F.pixel_unshuffle(pixels, patch_size)[0].flatten(1).T
        samples.append((codes.flatten(0, 2), patches, codes.shape[1:3]))
    generator = torch.Generator().manual_seed(0)
    weight, bias = fit_linear_path(samples, lambda codes: codes, kernel_size, generator, torch.device("cpu"))
    made = [F.conv2d(part, weight.float(), bias.float(), padding=kernel_size // 2) for part in maps]
    return to_uint8(F.pixel_shuffle(torch.cat(made), patch_size))


def trained_cnn(like: ImageTokenizer, pixels: torch.Tensor, minutes: float) -> SimVQGANModel:
    """The SimVQ paper's tokenizer with as many codes and tokens as `like`, trained on pixels (B, 3, size, size) in
    [0, 1]."""
    torch.manual_seed(0)
    levels = int(math.log2(like.config.decoder_patch_size)) + 1
    config = SimVQGANConfig(
        base_channels=32,
        channel_multiplier=[1, 2, 2, 4][:levels],
        image_size=like.config.image_size,
        codebook_size=like.config.codebook_size,
    )
    model = SimVQGANModel(config)
    print(f"SimVQ's CNN: {train(model, pixels, None, minutes)} steps in {minutes:g} minutes.", flush=True)
    return model.eval()


@torch.no_grad()
def measure(
    images: torch.Tensor, made: torch.Tensor, patch_size: int, lpips: torch.nn.Module | None
) -> dict[str, float]:
    """PSNR in dB, LPIPS where there is its network, and blocking on the grid of the tokenizer in the box; both
    (B, 3, height, width) of uint8."""
    result = painted(made, images, patch_size)
    if lpips is not None:
        scores = [lpips(a[None] / 255, b[None] / 255, normalize=True).item() for a, b in zip(made, images)]
        result["lpips_vgg"] = sum(scores) / len(scores)
    return result


def load_network() -> torch.nn.Module | None:
    """That of LPIPS (VGG), or a line that says why there is none."""
    print("Loading the network of LPIPS (its weights are downloaded if they are not cached).", flush=True)
    try:
        return load_lpips("vgg")
    except (OSError, RuntimeError) as error:
        print(f"LPIPS is left out: {error}", flush=True)
        return None


def table(results: dict) -> str:
    columns = {"bytes": ("bytes an image", ",.0f"), "psnr": ("PSNR", ".2f"), "lpips_vgg": ("LPIPS (VGG)", ".3f")}
    columns["blocking"] = ("blocking", ".2f")
    columns = {key: column for key, column in columns.items() if all(key in row for row in results.values())}
    lines = ["| | " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for name, row in results.items():
        lines.append(f"| {name} | " + " | ".join(format(row[key], form) for key, (_, form) in columns.items()) + " |")
    best = f"\nBest PSNR: {max(results, key=lambda name: results[name]['psnr'])}."
    if "lpips_vgg" in columns:
        best += f" Best LPIPS: {min(results, key=lambda name: results[name]['lpips_vgg'])}."
    lines.append(best)
    return "\n".join(lines) + "\n"


parser = CommandParser(__doc__)
parser.add_argument("--model_name_or_path", default=str(BOX), help="The tokenizer (default: the one in the box).")
parser.add_argument("--others", nargs="*", default=[], help="NAME=FOLDER of tokenizers to compare with.")
parser.add_argument("--data", required=True, help="Images: a folder, or a .txt file that lists them.")
parser.add_argument("--max_images", type=int, default=40, help="So many of them, drawn by a seed (default: 40).")
parser.add_argument("--train_data", help="Images to train SimVQ's CNN on: a folder, or a .txt file.")
parser.add_argument("--train_images", type=int, default=400, help="How many of them (default: 400).")
parser.add_argument("--minutes", type=float, default=0.0, help="Train it that long (default: 0, leave it out).")
parser.add_argument(
    "--oracle", nargs="*", type=int, default=[], choices=(1, 3, 5), help="Bounds of linear maps, such as 3 5."
)
parser.add_argument("--output_dir", required=True, type=Path, help="Where results go.")


@ends_in_one_line()
def main() -> None:
    args = parser.parse_args()
    if wrong := [other for other in args.others if "=" not in other]:
        raise ValueError(f"--others: '{wrong[0]}' must be NAME=FOLDER.")
    if args.minutes and not args.train_data:
        raise ValueError("--minutes needs --train_data, the images to train on.")
    lpips = load_network()
    named = {"the tokenizer": args.model_name_or_path, **dict(other.split("=", 1) for other in args.others)}
    models = {name: load_pretrained(folder, {}).eval() for name, folder in named.items()}
    box = models["the tokenizer"]
    size, patch_size = box.config.image_size, box.config.decoder_patch_size
    processor = load_processor(args.model_name_or_path, size)
    pixels, files = read(args.data, processor, args.max_images)
    if args.minutes:
        to_train_on = read(args.train_data, processor, args.train_images)[0]
        models["SimVQ's CNN"] = trained_cnn(box, to_train_on, args.minutes)
    images = to_uint8(pixels)
    limit, results, rows = bytes_of_tokens(box, size), {}, [images[:8] / 255]
    for name, model in models.items():
        made = by_tokenizer(model, images)
        results[name] = {"bytes": bytes_of_tokens(model, size), **measure(images, made, patch_size, lpips)}
        rows.append(made[:8] / 255)
    for kernel_size in args.oracle:
        made, name = by_oracle(box, images, kernel_size), f"its best linear map, {kernel_size} x {kernel_size} codes"
        results[name] = {"bytes": limit, **measure(images, made, patch_size, lpips)}
        rows.append(made[:8] / 255)
    for name, options in CODECS.items():
        made, sizes = zip(*[by_codec(image, limit, **options) for image in images])
        made = torch.stack(made)
        results[name] = {"bytes": sum(sizes) / len(sizes), **measure(images, made, patch_size, lpips)}
        rows.append(made[:8] / 255)
    save_rows(rows, args.output_dir / "pictures.png", columns=min(8, len(images)))
    result = {"images": [file.name for file in files], "image_size": size, "rows": results}
    write_whole(args.output_dir / "results.json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    write_whole(args.output_dir / "table.md", lambda path: path.write_text(table(results)))
    print(f"\n{len(images)} images of {size} px.\n\n{table(results)}\n{args.output_dir / 'pictures.png'}")


if __name__ == "__main__":
    main()
