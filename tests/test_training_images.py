"""The images of the checkpoint: how they are made, and which are held out."""

import random
from pathlib import Path

import numpy as np
from PIL import Image
from test_loading import run

from checkpoints import training_images


def test_tiles_cover_a_photograph_at_the_scales_that_do_not_enlarge_it(tmp_path):
    photo = Image.linear_gradient("L").resize((1440, 720)).convert("RGB")
    tiles = training_images.cut_tiles(photo, "a_lake", tmp_path)
    assert [path.name for path in tiles] == [
        f"a_lake-{scale}-{i:02d}.jpg" for scale, count in ((352, 2), (704, 4)) for i in range(count)
    ]
    means = [np.asarray(Image.open(path).convert("L")).mean() for path in tiles]
    assert abs(means[0] - 127) < 3 and means[2] < 100 < 150 < means[-1]  # dark at the top, bright at the bottom
    assert len(training_images.cut_tiles(photo.resize((300, 200)), "small", tmp_path)) == 1


def test_held_out_emoji_have_no_sibling_in_training():
    names = [f"1f{i:03x}.webp" for i in range(40)] + [f"1f{i:03x}-200d-2642.webp" for i in range(5)]
    files = [Path(name) for name in sorted(names)]
    train, held_out = training_images.split_emoji(files)
    code = [{file.stem.split("-")[0] for file in part} for part in (train, held_out)]
    assert held_out and not code[0] & code[1]
    assert len(train) + len(held_out) < len(files)  # siblings on both sides are in neither


def test_a_tenth_of_the_sources_is_held_out_and_the_wallpapers_that_always_were():
    sources = [f"a_{i:02d}" for i in range(40)] + ["mate_Aqua", "mate_Dune"]
    out = training_images.held_out(sources)
    assert {"mate_Aqua", "mate_Dune"} < out and len(out) == 6 and out == training_images.held_out(sources[::-1])


def test_cut_outs_lie_on_a_background_and_synthetic_images_are_of_four_kinds():
    draw = random.Random(0)
    cut_out = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    picture = np.asarray(training_images.placed(cut_out, Image.new("RGB", (64, 64), "blue"), draw))
    red = (picture == (255, 0, 0)).all(-1).mean()
    assert 0.2 < red < 0.55 and (picture == (0, 0, 255)).all(-1).mean() > 0.4
    fonts = sorted(map(str, Path(training_images.matplotlib.get_data_path()).glob("fonts/ttf/DejaVu*.ttf")))
    colors = [
        len(np.unique(np.asarray(training_images.synthetic(i, 64, draw, fonts)).reshape(-1, 3), axis=0))
        for i in range(4)
    ]
    assert colors[0] == 1 < colors[2] and colors[1] > 16 and colors[3] > 1


def test_script_explains_itself(tmp_path):
    assert "heldout_photos.txt" in run(["-m", "checkpoints.training_images", "--help"], tmp_path)


def test_the_120_crops_of_wallpapers_are_cut_as_they_always_were(tmp_path):
    """Of every wallpaper all tiles at three scales, but for four tiles; the first of them is its middle."""
    for file in training_images.HELDOUT_WALLPAPERS.values():
        (tmp_path / "packages" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((1680, 1050)).save(tmp_path / "packages" / file)
    training_images.cut_wallpapers(tmp_path / "packages", tmp_path / "wallpapers")
    names = sorted(path.stem for path in (tmp_path / "wallpapers").iterdir())
    assert len(names) == 120 and not training_images.WITHOUT_DETAIL & set(names)
    assert [sum(name.startswith(f"grey-{scale}-") for name in names) for scale in (288, 576, 1024)] == [1, 6, 24]
    with Image.open(tmp_path / "wallpapers" / "grey-288-00.jpg") as crop:
        rows = np.asarray(crop.convert("L")).mean(1)
    assert len(rows) == 256 and abs(rows[0] - 16 / 288 * 255) < 2 and abs(rows[-1] - 272 / 288 * 255) < 2
