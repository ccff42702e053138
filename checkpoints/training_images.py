"""The images on which `vqrae-dinov2-small` was trained, and those that were held out.

    python -m checkpoints.training_images --output_dir runs/images

Fetches seven Debian packages (Debian or Ubuntu; 500 MB) and the emoji @lobehub/fluent-emoji-3d (npm; 25 MB), and makes
of them, in about 10 minutes, below `images`:

train/photos     tiles of photographs and wallpapers at several scales; of every eighth a grey copy, and of every eighth
                 one with its colours exchanged, so that the palette is not that of few photographs
train/objects    the stamps of Tux Paint and the drawings of GCompris, on backgrounds of many kinds
train/emoji      as they are, and half of them on backgrounds as well
train/synthetic  flat colours, gradients, shapes and text; 6 % of all
heldout/...      the same of sources of which nothing is trained on: every tenth photograph, stamp and drawing, four
                 wallpapers, and the emoji without a sibling in training
licences         the copyright file of each package

and beside `images`, in `wallpapers`, the 120 crops of the four held-out wallpapers on which every tokenizer of this
repository was measured since the first. The lists are `train.txt`, `heldout_photos.txt`, `heldout_objects.txt`,
`heldout_emoji.txt`, `heldout.txt` with some of each of these, to look at while training, and `heldout_wallpapers.txt`.
The same command makes the same files.
"""

import io
import random
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from eval.commands import CommandParser
from eval.files import write_folder_whole, write_whole
from image_processing_simvq import VQRAEImageProcessor
from reading.files import find_images


# Photographs and wallpapers in the packages. Licences: the files /usr/share/doc/PACKAGE/copyright in them.
PACKAGES = {
    "mate-backgrounds=1.26.0-1": ["**/nature/*.jpg", "**/abstract/Elephants.jpg", "**/abstract/*s.png"],
    "plasma-workspace-wallpapers=4:5.27.5-2": ["**/wallpapers/*/contents/images/*"],
    "endless-sky-high-dpi=0.9.8-1": ["**/images/land/*.jpg", "**/images/scene/*.jpg"],
    "lomiri-wallpapers-16.04=20.04.0-2": ["**/*.jpg"],
    "lomiri-wallpapers-20.04=20.04.0-2": ["**/*.jpg"],
    "gcompris-qt-data=3.1-2": ["**/*.rcc"],
    "tuxpaint-stamps-default=2022.06.04-1": ["**/stamps/**/*.png"],
}
EMOJI = "@lobehub/fluent-emoji-3d@1.1.0"
# held out since the first checkpoint: measurements of all of them can be compared
HELDOUT_WALLPAPERS = {
    "Aqua": "mate-backgrounds/usr/share/backgrounds/mate/nature/Aqua.jpg",
    "Dune": "mate-backgrounds/usr/share/backgrounds/mate/nature/Dune.jpg",
    "Grey": "plasma-workspace-wallpapers/usr/share/wallpapers/Grey/contents/images/2560x1600.jpg",
    "TwoWings": "mate-backgrounds/usr/share/backgrounds/mate/nature/TwoWings.jpg",
}
WITHOUT_DETAIL = {"aqua-1024-14", "twowings-1024-00", "twowings-1024-05", "twowings-1024-18"}  # never measured on
PHOTOGRAPHS = (
    "categorization",
    "details",
    "erase",
    "explore_",
    "louis-braille",
    "babyshapes",
    "digital",
)  # of GCompris
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}  # variants of the same pictures, left out
TILE, OBJECT = 320, 256
SCALES, WALLPAPER_SCALES = (352, 704, 1100), (288, 576, 1024)  # of a photograph's shorter side, in pixels


def fetch(folder: Path) -> None:
    """Unpacks every package into a folder of its name, and the emoji into `emoji`."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as downloaded:
        for package in PACKAGES:
            print(f"Fetching {package} from the Debian archive.", flush=True)
            subprocess.run(["apt-get", "download", package], cwd=downloaded, check=True, timeout=1800)
            name = package.split("=")[0]
            (archive,) = Path(downloaded).glob(f"{name}_*.deb")
            subprocess.run(["dpkg-deb", "-x", archive, folder / name], check=True, timeout=600)
        print(f"Fetching {EMOJI} from npm.", flush=True)
        subprocess.run(["npm", "pack", "--silent", EMOJI], cwd=downloaded, check=True, timeout=1800)
        (archive,) = Path(downloaded).glob("*.tgz")
        with tarfile.open(archive) as members:
            members.extractall(folder / "emoji", filter="data")


# Sources -------------------------------------------------------------------------------------------------------------


def resources(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files in a Qt resource file (versions 1 to 3); those compressed with Zstandard are passed
    over."""
    content = path.read_bytes()
    version, tree, data, names = struct.unpack(">4I", content[4:20])
    size = 14 if version < 2 else 22

    def walk(number: int, above: str) -> Iterator[tuple[str, bytes]]:
        at = tree + number * size
        name_at, flags = struct.unpack(">IH", content[at : at + 6])
        length = struct.unpack(">H", content[names + name_at : names + name_at + 2])[0]
        name = content[names + name_at + 6 : names + name_at + 6 + 2 * length].decode("utf-16-be") if number else ""
        if flags & 2:
            count, first = struct.unpack(">II", content[at + 6 : at + 14])
            for child in range(first, first + count):
                yield from walk(child, f"{above}/{name}" if number else "")
            return
        at = data + struct.unpack(">I", content[at + 10 : at + 14])[0]
        length = struct.unpack(">I", content[at : at + 4])[0]
        found = content[at + 4 : at + 4 + length]
        if not flags & 4:
            yield f"{above}/{name}", zlib.decompress(found[4:]) if flags & 1 else found

    yield from walk(0, "")


def named(parts: list[str]) -> str:
    """The name of a source, which comes before the first `-` of its files' names."""
    return "_".join(parts).replace("-", "_").replace(" ", "_").replace("@2x", "")


def photographs(unpacked: Path) -> dict[str, Image.Image]:
    """Photographs and wallpapers, by the names of their sources."""
    found: dict[str, Path | bytes] = {}
    for package, patterns in PACKAGES.items():
        name = package.split("=")[0]
        for file in sorted({file for pattern in patterns for file in (unpacked / name).glob(pattern)}):
            if name.startswith("plasma"):  # the largest of the sizes of a wallpaper
                source, best = named(["plasma", file.parts[-4]]), None
                best = found.get(source)
                if best is None or file.stat().st_size > best.stat().st_size:
                    found[source] = file
            elif name.startswith("gcompris"):
                for inside, content in resources(file):
                    room = inside.partition("/activities/")[2].split("/")[0]
                    if inside.endswith(".webp") and room.startswith(PHOTOGRAPHS):
                        found[named(["gcompris", room, Path(inside).stem])] = content
            elif not name.startswith("tuxpaint"):
                found[named([name.split("-")[0], file.stem])] = file
    images = {}
    for source, file in sorted(found.items()):
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        if image.mode == "RGB" and min(image.size) >= 190:  # neither cut-outs nor thumbnails
            images[source] = image
    return images


def objects(unpacked: Path) -> dict[str, Image.Image]:
    """Cut-outs with transparency: stamps of Tux Paint but for letters and signs, drawings of GCompris."""
    found = {}
    for file in sorted((unpacked / "tuxpaint-stamps-default").glob("**/stamps/**/*.png")):
        parts = file.parts[file.parts.index("stamps") + 1 :]
        if parts[0] != "symbols":
            found[named(["stamp", *parts[:-1], file.stem])] = Image.open(file)
    for file in sorted((unpacked / "gcompris-qt-data").glob("**/lang.rcc")):
        for inside, content in resources(file):
            if inside.endswith(".webp"):
                found[named(["drawing", Path(inside).stem])] = Image.open(io.BytesIO(content))
    return found


def split_emoji(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Training and held-out emoji. Every tenth group of names was held out, where `1f3c3.webp` and
    `1f3c3-200d-2642.webp` counted as two groups; what has such a sibling in training is in neither part."""
    groups = sorted({file.name.split("-")[0] for file in files})
    heldout_groups = set(groups[::10])
    train = [file for file in files if file.name.split("-")[0] not in heldout_groups]
    known = {file.stem.split("-")[0] for file in train}
    return train, [file for file in files if file.stem.split("-")[0] not in known]


def held_out(sources: list[str]) -> set[str]:
    """Every tenth, and the wallpapers that always were."""
    always = {source for source in sources if source.split("_", 1)[-1] in HELDOUT_WALLPAPERS}
    return always | set(sorted(set(sources) - always)[5::10])


# Images --------------------------------------------------------------------------------------------------------------


def cut_tiles(
    photo: Image.Image,
    source: str,
    folder: Path,
    scales: tuple[int, ...] = SCALES,
    tile: int = TILE,
    step: int = 2,
    quality: int = 90,
) -> list[Path]:
    """Tiles of one photograph, `source-scale-number.jpg`: at each scale that does not enlarge it, all of them at the
    first and every `step`-th at the others; a photograph that is smaller than the first scale becomes one tile."""
    photo = VQRAEImageProcessor.convert_to_rgb(None, photo)
    written = []
    for scale in scales:
        factor = scale / min(photo.size)
        if factor > 1 and scale > scales[0]:
            break
        scaled = photo.resize([round(side * factor) for side in photo.size], Image.Resampling.LANCZOS)
        columns, rows = (side // tile for side in scaled.size)
        left, top = (scaled.width - columns * tile) // 2, (scaled.height - rows * tile) // 2
        corners = [(left + x * tile, top + y * tile) for y in range(rows) for x in range(columns)]
        for number, (x, y) in enumerate(corners[:: 1 if scale == scales[0] else step]):
            written.append(folder / f"{source}-{scale}-{number:02d}.jpg")
            scaled.crop((x, y, x + tile, y + tile)).save(written[-1], quality=quality)
    return written


def cut_wallpapers(unpacked: Path, folder: Path) -> None:
    """The 120 crops of the wallpapers that always were held out, 256 px each."""
    folder.mkdir(parents=True)
    for name, file in HELDOUT_WALLPAPERS.items():
        with Image.open(unpacked / file) as photo:
            tiles = cut_tiles(photo, name.lower(), folder, WALLPAPER_SCALES, tile=256, step=1, quality=92)
        for tile in tiles:
            if tile.stem in WITHOUT_DETAIL:
                tile.unlink()


def gradient(size: int, draw: random.Random) -> Image.Image:
    """Between two or four colours, in any direction or around a point."""
    colors = np.array([[draw.randrange(256) for _ in range(3)] for _ in range(4)], dtype=np.float32)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / (size - 1)
    kind = draw.choice(("linear", "radial", "corners"))
    if kind == "corners":
        mixed = (1 - y)[..., None] * ((1 - x)[..., None] * colors[0] + x[..., None] * colors[1])
        mixed = mixed + y[..., None] * ((1 - x)[..., None] * colors[2] + x[..., None] * colors[3])
    else:
        if kind == "linear":
            angle = draw.uniform(0, 2 * np.pi)
            place = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)
        else:
            place = np.hypot(x - draw.uniform(0, 1), y - draw.uniform(0, 1))
        place = (place - place.min()) / (place.max() - place.min())
        mixed = (1 - place)[..., None] * colors[0] + place[..., None] * colors[1]
    return Image.fromarray(mixed.round().astype(np.uint8))


def background(size: int, tiles: list[Path], draw: random.Random) -> Image.Image:
    """A flat colour, a gradient, or a part of a photograph."""
    kind = draw.choice(("flat", "flat", "gradient", "photograph"))
    if kind == "flat":
        return Image.new("RGB", (size, size), tuple(draw.randrange(256) for _ in range(3)))
    if kind == "gradient":
        return gradient(size, draw)
    with Image.open(draw.choice(tiles)) as tile:
        return tile.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def placed(cut_out: Image.Image, canvas: Image.Image, draw: random.Random) -> Image.Image:
    """A cut-out somewhere on a canvas, on 70 to 100 % of its size."""
    cut_out = cut_out.convert("RGBA")
    factor = draw.uniform(0.7, 1) * min(canvas.width / cut_out.width, canvas.height / cut_out.height)
    cut_out = cut_out.resize([max(1, round(side * factor)) for side in cut_out.size], Image.Resampling.LANCZOS)
    at = draw.randint(0, canvas.width - cut_out.width), draw.randint(0, canvas.height - cut_out.height)
    canvas = canvas.convert("RGBA")
    canvas.alpha_composite(cut_out, at)
    return canvas.convert("RGB")


def synthetic(number: int, size: int, draw: random.Random, fonts: list[str]) -> Image.Image:
    """In turn a flat colour, a gradient, shapes, and text."""
    kind = ("flat", "gradient", "shapes", "text")[number % 4]
    if kind == "flat":
        return Image.new("RGB", (size, size), tuple(draw.randrange(256) for _ in range(3)))
    if kind == "gradient":
        return gradient(size, draw)

    def color() -> tuple[int, ...]:
        return tuple(draw.choice((0, 255, draw.randrange(256), draw.randrange(256))) for _ in range(3))

    image = Image.new("RGB", (size, size), color())
    pen = ImageDraw.Draw(image)
    if kind == "text":
        top = draw.randint(0, 8)
        while top < size:
            height = draw.randint(10, 36)
            text = "".join(
                draw.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,") for _ in range(40)
            )
            pen.text((draw.randint(-8, 8), top), text, color(), ImageFont.truetype(draw.choice(fonts), height))
            top += round(1.3 * height)
        return image
    for _ in range(draw.randint(3, 14)):
        corners = [draw.randint(-20, size + 20) for _ in range(4)]
        box = [min(corners[::2]), min(corners[1::2]), max(corners[::2]) + 1, max(corners[1::2]) + 1]
        shape = draw.choice(("line", "line", "rectangle", "ellipse"))
        if shape == "line":
            pen.line(corners, color(), draw.randint(1, 9))
        else:
            getattr(pen, shape)(box, color() if draw.random() < 0.7 else None, color(), draw.randint(1, 6))
    return image


# The set -------------------------------------------------------------------------------------------------------------


def make(unpacked: Path, output: Path) -> None:
    """Writes all files but the lists."""
    draw = random.Random(0)
    for part in ("train", "heldout"):
        for kind in ("photos", "objects", "emoji"):
            (output / part / kind).mkdir(parents=True)
    (output / "train" / "synthetic").mkdir()

    photos = photographs(unpacked)
    out, tiles = held_out(list(photos)), []
    for source, photo in tqdm(photos.items(), desc="Photographs", unit="photo"):
        part = "heldout" if source in out else "train"
        written = cut_tiles(photo, source, output / part / "photos")
        tiles += written if part == "train" else []
    for number, tile in enumerate(tqdm(tiles, desc="Copies in other colours", unit="tile")):
        if number % 8 in (3, 7):
            with Image.open(tile) as image:
                bands = draw.choice(("BGR", "GBR", "BRG", "RBG", "GRB"))
                channels = dict(zip("RGB", image.split()))
                other = Image.merge("RGB", [channels[band] for band in bands])
                other = image.convert("L").convert("RGB") if number % 8 == 3 else other
                other.save(tile.with_stem(tile.stem + ("-grey" if number % 8 == 3 else "-exchanged")), quality=90)

    cut_outs = objects(unpacked)
    out = held_out(list(cut_outs))
    for source, image in tqdm(cut_outs.items(), desc="Objects", unit="object"):
        part, count = ("heldout", 1) if source in out else ("train", 3 if source.startswith("stamp") else 2)
        for number in range(count):
            canvas = background(OBJECT, tiles, draw) if number else Image.new("RGB", (OBJECT, OBJECT), "white")
            placed(image, canvas, draw).save(output / part / "objects" / f"{source}-{number}.jpg", quality=92)

    emoji = sorted((unpacked / "emoji").glob("**/*.webp"))
    train, heldout = split_emoji([file for file in emoji if not SKIN_TONES & set(file.stem.split("-"))])
    for files, part in ((train, "train"), (heldout, "heldout")):
        for file in files:
            shutil.copy(file, output / part / "emoji")
    for file in tqdm(train[::2], desc="Emoji on backgrounds", unit="emoji"):
        with Image.open(file) as image:
            picture = placed(image, background(OBJECT, tiles, draw), draw)
        picture.save(output / "train" / "emoji" / f"{file.stem}-placed.jpg", quality=92)

    fonts = sorted(str(file) for file in (Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVu*.ttf"))
    for number in tqdm(range(480), desc="Synthetic images", unit="image"):
        synthetic(number, OBJECT, draw, fonts).save(output / "train" / "synthetic" / f"made-{number:03d}.png")

    (output / "licences").mkdir()
    for package in PACKAGES:
        name = package.split("=")[0]
        shutil.copy(unpacked / name / "usr" / "share" / "doc" / name / "copyright", output / "licences" / f"{name}.txt")
    (output / "licences" / "emoji.txt").write_text(f"{EMOJI}: MIT, see its package.json.\n")


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--output_dir", required=True, type=Path, help="where images, lists and licences go")
    parser.add_argument("--packages", type=Path, help="folder for the packages (default: OUTPUT_DIR/packages)")
    args = parser.parse_args(arguments)
    unpacked, images = args.packages or args.output_dir / "packages", args.output_dir / "images"
    wallpapers = args.output_dir / "wallpapers"
    if not unpacked.exists():
        write_folder_whole(unpacked, fetch)
    if not images.exists():
        write_folder_whole(images, lambda folder: make(unpacked, folder))
    if not wallpapers.exists():
        write_folder_whole(wallpapers, lambda folder: cut_wallpapers(unpacked, folder))
    lists = {"train": find_images(images / "train")}
    lists |= {f"heldout_{kind}": find_images(images / "heldout" / kind) for kind in ("photos", "objects", "emoji")}
    lists["heldout"] = [file for name, files in lists.items() if name != "train" for file in files[:: len(files) // 20]]
    lists["heldout_wallpapers"] = find_images(wallpapers)
    for name, files in lists.items():
        text = "".join(f"{file.resolve()}\n" for file in files)
        write_whole(args.output_dir / f"{name}.txt", lambda path, text=text: path.write_text(text))
        print(f"{len(files)} images: {args.output_dir / name}.txt")


if __name__ == "__main__":
    main()
