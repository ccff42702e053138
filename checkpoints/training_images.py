"""The images on which `vqrae-dinov2-small` was trained, and those that were held out.

    python -m checkpoints.training_images --photos PHOTOS --emoji EMOJI --output_dir runs/images

PHOTOS: 256 px tiles of the wallpapers of Debian's mate-backgrounds and plasma-workspace-wallpapers, named
`source-....jpg`. EMOJI: the renders of @lobehub/fluent-emoji-3d. To these come tiles of the photographs in three more
packages, which this fetches and unpacks (Debian or Ubuntu, 165 MB). Writes `train.txt`, `heldout_photos.txt`,
`heldout_emoji.txt`, and `heldout.txt` with every fifth of both, to look at while training; what is held out has no
source in common with what is trained on.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from eval.files import write_folder_whole, write_whole
from reading.sources import find_images
from training.data import split_files


# Licences: the files /usr/share/doc/PACKAGE/copyright in the packages
PACKAGES = {
    "endless-sky-high-dpi=0.9.8-1": "**/images/land/*.jpg",  # public domain, CC-BY-SA-3.0, CC-BY-SA-4.0
    "lomiri-wallpapers-16.04=20.04.0-2": "**/*.jpg",  # CC-BY-SA-3.0
    "lomiri-wallpapers-20.04=20.04.0-2": "**/*.jpg",  # CC-BY-SA-4.0
}
TILE = 256


def cut_tiles(file: Path, folder: Path) -> None:
    """Tiles of one photograph at two scales, named `source-scale-number.jpg`: all at 288 px of its shorter side, every
    second at 576 px."""
    with Image.open(file) as photo:
        photo = photo.convert("RGB")
    source = file.stem.split("@")[0].replace("-", "_")
    for scale, step in ((288, 1), (576, 2)):
        factor = scale / min(photo.size)
        scaled = photo.resize([round(side * factor) for side in photo.size], Image.Resampling.LANCZOS)
        columns, rows = (side // TILE for side in scaled.size)
        left, top = (scaled.width - columns * TILE) // 2, (scaled.height - rows * TILE) // 2
        corners = [(left + x * TILE, top + y * TILE) for y in range(rows) for x in range(columns)]
        for number, (x, y) in enumerate(corners[::step]):
            tile = scaled.crop((x, y, x + TILE, y + TILE))
            tile.save(folder / f"{source}-{scale}-{number:02d}.jpg", quality=95)


def fetch_tiles(folder: Path) -> None:
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as unpacked:
        for package, pattern in PACKAGES.items():
            print(f"Fetching {package} from the Debian archive.", flush=True)
            subprocess.run(["apt-get", "download", package], cwd=unpacked, check=True)
            name = package.split("=")[0]
            (archive,) = Path(unpacked).glob(f"{name}_*.deb")
            subprocess.run(["dpkg-deb", "-x", archive, Path(unpacked) / name], check=True)
            for file in tqdm(sorted((Path(unpacked) / name).glob(pattern)), desc="Tiles", unit="photo"):
                cut_tiles(file, folder)


def split_emoji(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Training and held-out emoji. Every tenth group of names was held out, where `1f3c3.webp` and
    `1f3c3-200d-2642.webp` counted as two groups; what has such a sibling in training is in neither part."""
    groups = sorted({file.name.split("-")[0] for file in files})
    heldout_groups = set(groups[::10])
    train = [file for file in files if file.name.split("-")[0] not in heldout_groups]
    known = {file.stem.split("-")[0] for file in train}
    return train, [file for file in files if file.stem.split("-")[0] not in known]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="folder of tiles, split by their names up to the first '-'")
    parser.add_argument("--emoji", required=True, help="folder of emoji, split likewise")
    parser.add_argument("--output_dir", required=True, type=Path)
    args = parser.parse_args(arguments)
    tiles = args.output_dir / "tiles"
    if not tiles.exists():
        write_folder_whole(tiles, fetch_tiles)
    photos, heldout_photos = split_files(find_images(args.photos), 0.15, "-")
    emoji, heldout_emoji = split_emoji(find_images(args.emoji))
    lists = {
        "train": photos + emoji + find_images(tiles),
        "heldout": (heldout_photos + heldout_emoji)[::5],
        "heldout_photos": heldout_photos,
        "heldout_emoji": heldout_emoji,
    }
    for name, files in lists.items():
        text = "".join(f"{file.resolve()}\n" for file in files)
        write_whole(args.output_dir / f"{name}.txt", lambda path, text=text: path.write_text(text))
        print(f"{len(files)} images: {args.output_dir / name}.txt")


if __name__ == "__main__":
    main()
