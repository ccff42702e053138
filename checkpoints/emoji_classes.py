"""The emoji of `training_images`, in a folder for each of Unicode's groups: what `emoji-llama` was trained on.

    python -m checkpoints.training_images --output_dir runs/images
    python -m checkpoints.emoji_classes --images runs/images/images --output_dir runs/emoji

Makes `train` and `heldout` below the output folder. Held out are the emoji on which the tokenizer was not trained
either. Each one to train on comes with --variants copies that are moved and scaled a little, wholly in the picture, and
of which every second one is mirrored: a shift by less than a token changes most tokens, so these show a generator many
more rows than there are emoji.

The groups ("Smileys & Emotion", ...) are those of `emoji-test.txt` in Debian's package unicode-data, which is fetched
(8 MB) unless the file is named.
"""

import random
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from eval.commands import CommandParser, ends_in_one_line
from eval.files import write_folder_whole
from eval.options import whole_number


PACKAGE = "unicode-data"
ANY_FORM = {"fe0f"}  # a code point that only asks for a picture: names of files have it or not


def fetch_groups() -> str:
    """The text of `emoji-test.txt` from the Debian archive."""
    with tempfile.TemporaryDirectory() as folder:
        print(f"Fetching {PACKAGE} from the Debian archive.", flush=True)
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, timeout=600)
        (archive,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True, timeout=600)
        return (Path(folder) / "usr/share/unicode/emoji/emoji-test.txt").read_text(encoding="utf-8")


def code_points(text: str, separator: str | None) -> tuple[str, ...]:
    """Those of a sequence, in small hexadecimal digits, without `ANY_FORM`."""
    return tuple(point for point in text.lower().split(separator) if point not in ANY_FORM)


def groups_of(text: str) -> dict[tuple[str, ...], str]:
    """{code points: group} of the lines of `emoji-test.txt`."""
    groups, group = {}, None
    for line in text.splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line and not line.startswith("#"):
            groups[code_points(line.partition(";")[0], None)] = group
    return groups


def moved(image: Image.Image, draws: random.Random) -> Image.Image:
    """The picture 0.75 to 1.05 times as large and moved by up to a tenth of its side, on transparent ground, where what
    is not transparent stays whole.

    Args:
        image: RGBA.
        draws: of scale and place.
    """
    box = image.getbbox()
    sides = [box[2] - box[0], box[3] - box[1]]
    scale = min(draws.uniform(0.75, 1.05), *(full / side for full, side in zip(image.size, sides)))
    sides = [round(side * scale) for side in sides]
    corner = []
    for start, end, side, full in zip(box[:2], box[2:], sides, image.size):
        wanted = (start + end - side) / 2 + draws.uniform(-0.1, 0.1) * full
        corner.append(min(max(round(wanted), 0), full - side))
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image.crop(box).resize(sides, Image.Resampling.BICUBIC), tuple(corner))
    return canvas


def arrange(images: Path, groups: dict[tuple[str, ...], str], variants: int, output: Path) -> None:
    """Copies emoji to `output/train/GROUP`, each with its variants, and to `output/heldout/GROUP`; those that Unicode
    does not list are left out and counted."""
    for part in ("train", "heldout"):
        files = sorted((images / part / "emoji").glob("*.webp"))
        if not files:
            raise ValueError(
                f"There are no emoji in {images / part / 'emoji'}: make them by checkpoints.training_images."
            )
        counts = Counter()
        for file in tqdm(files, desc=part, unit="emoji"):
            group = groups.get(code_points(file.stem, "-"))
            counts[group or "in no group, left out"] += 1
            if group:
                folder = output / part / group
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder)
                for number in range(variants if part == "train" else 0):
                    with Image.open(file) as image:
                        variant = moved(image.convert("RGBA"), random.Random(f"{file.stem}/{number}"))
                    if number % 2:
                        variant = ImageOps.mirror(variant)
                    variant.save(folder / f"{file.stem}-moved{number}.png")
        print(f"{part}: {', '.join(f'{count} {group}' for group, count in counts.most_common())}.")


parser = CommandParser(__doc__)
parser.add_argument("--images", required=True, type=Path, help="The folder `images` that training_images makes.")
parser.add_argument("--output_dir", required=True, type=Path, help="A folder that does not exist.")
parser.add_argument(
    "--variants", type=whole_number(0), default=16, help="Moved and scaled copies of each (default: 16)."
)
parser.add_argument("--groups", type=Path, help="Unicode's emoji-test.txt (default: fetched).")


@ends_in_one_line()
def main() -> None:
    args = parser.parse_args()
    if args.output_dir.exists():
        raise ValueError(f"--output_dir {args.output_dir} exists: name a new folder, or remove it.")
    groups = groups_of(args.groups.read_text(encoding="utf-8") if args.groups else fetch_groups())
    write_folder_whole(args.output_dir, lambda folder: arrange(args.images, groups, args.variants, folder))


if __name__ == "__main__":
    main()
