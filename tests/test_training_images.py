"""The images of the checkpoint: how they are cut, and which are held out."""

from pathlib import Path

from PIL import Image
from test_loading import run

from checkpoints import training_images


def test_tiles_cover_a_photograph_at_two_scales(tmp_path):
    Image.linear_gradient("L").resize((1440, 720)).convert("RGB").save(tmp_path / "a-lake@2x.jpg")
    training_images.cut_tiles(tmp_path / "a-lake@2x.jpg", tmp_path)
    tiles = sorted(path.name for path in tmp_path.glob("a_lake-*"))
    assert tiles == [f"a_lake-{scale}-{i:02d}.jpg" for scale, count in ((288, 2), (576, 4)) for i in range(count)]
    means = [sum(Image.open(tmp_path / name).convert("L").resize((1, 1)).tobytes()) for name in tiles]
    assert abs(means[0] - 127) < 3 and means[2] < 100 < 150 < means[-1]  # dark at the top, bright at the bottom


def test_held_out_emoji_have_no_sibling_in_training():
    names = [f"1f{i:03x}.webp" for i in range(40)] + [f"1f{i:03x}-200d-2642.webp" for i in range(5)]
    files = [Path(name) for name in sorted(names)]
    train, held_out = training_images.split_emoji(files)
    code = [{file.stem.split("-")[0] for file in part} for part in (train, held_out)]
    assert held_out and not code[0] & code[1]
    assert len(train) + len(held_out) < len(files)  # siblings on both sides are in neither


def test_script_explains_itself(tmp_path):
    assert "heldout_photos.txt" in run(["-m", "checkpoints.training_images", "--help"], tmp_path)
