"""The emoji that the generator in the box is trained on, arranged by class."""

import random
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from checkpoints import emoji_classes


EMOJI_TEST = """# group: Smileys & Emotion
1F600 ; fully-qualified # 😀 E1.0 grinning face
# group: Flags
1F3F3 FE0F ; fully-qualified # 🏳️ E0.7 white flag
"""


def emoji(box: tuple[int, int, int, int]) -> Image.Image:
    """A red rectangle on transparent ground."""
    image = Image.new("RGBA", (64, 64))
    image.paste((200, 10, 10, 255), box)
    return image


@pytest.fixture
def images(tmp_path):
    for part in ("train", "heldout"):
        (tmp_path / "images" / part / "emoji").mkdir(parents=True)
        for name in ("1f600", "1f3f3", "1f999"):  # the last is in no group
            emoji((10, 20, 50, 60)).save(tmp_path / "images" / part / "emoji" / f"{name}.webp", lossless=True)
    (tmp_path / "emoji-test.txt").write_text(EMOJI_TEST, encoding="utf-8")
    return tmp_path / "images"


def test_emoji_are_sorted_by_group_and_those_to_train_on_have_variants(images, tmp_path, monkeypatch, capsys):
    flags = ["--images", images, "--groups", tmp_path / "emoji-test.txt", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["emoji_classes.py", *map(str, flags), "--variants", "2"])
    emoji_classes.main()
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert found == {
        "heldout/Flags/1f3f3.webp",
        "heldout/Smileys & Emotion/1f600.webp",
        "train/Flags/1f3f3.webp",
        "train/Flags/1f3f3-moved0.png",
        "train/Flags/1f3f3-moved1.png",
        "train/Smileys & Emotion/1f600.webp",
        "train/Smileys & Emotion/1f600-moved0.png",
        "train/Smileys & Emotion/1f600-moved1.png",
    }
    assert "1 in no group, left out" in capsys.readouterr().out
    for number in range(2):  # every second one is mirrored
        with Image.open(images / "train" / "emoji" / "1f3f3.webp") as original:
            expected = emoji_classes.moved(original.convert("RGBA"), random.Random(f"1f3f3/{number}"))
        with Image.open(tmp_path / "out" / "train" / "Flags" / f"1f3f3-moved{number}.png") as found:
            assert found.tobytes() == (ImageOps.mirror(expected) if number else expected).tobytes()


@pytest.mark.parametrize("box", [(10, 20, 50, 60), (0, 0, 64, 64), (0, 30, 64, 34)])
def test_a_moved_emoji_is_whole_and_keeps_its_shape(box):
    original = emoji(box)
    sides = np.array([box[2] - box[0], box[3] - box[1]])
    boxes = set()
    for seed in range(40):
        made = emoji_classes.moved(original, random.Random(seed))
        assert made.size == original.size and made.mode == "RGBA"
        found = made.getbbox()
        scales = (np.array([found[2] - found[0], found[3] - found[1]])) / sides
        assert (scales > 0.7).all() and (scales < 1.1).all()
        assert (np.abs(scales[0] - scales[1]) * sides <= 1).any()  # to a pixel
        assert made.getchannel("A").getextrema()[1] == 255
        boxes.add(found)
    assert len(boxes) > 10
    again = emoji_classes.moved(original, random.Random(3))
    assert again.tobytes() == emoji_classes.moved(original, random.Random(3)).tobytes()
