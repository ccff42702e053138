"""Words of messages."""

import re

import pytest
from test_loading import ROOT

from reading.files import find_images
from reading.wording import counted, did_you_mean, one_of_processes
from training.data import split_files


def test_what_is_counted_is_said_as_of_one_or_of_several():
    assert counted(1, "image") == "1 image" and counted(0, "image") == "0 images"
    assert counted(1200, "class", "classes") == "1,200 classes"
    assert counted(1, "image was", "images were") == "1 image was"


def test_a_bar_of_one_of_several_processes_says_so():
    assert one_of_processes("Images", 1) == "Images"
    assert one_of_processes("Images", 8) == "Images (one of 8 processes)"


def test_messages_say_one_of_what_there_is_one_of(tmp_path, capsys):
    (tmp_path / "a.png").touch()
    (tmp_path / "notes.md").touch()
    files = find_images(tmp_path)
    assert "1 file is left out, no image by its name" in "".join(capsys.readouterr())
    with pytest.raises(ValueError, match=r"^1 image in 1 group cannot be split"):
        split_files(files, 0.1, None)


def test_no_message_leaves_open_how_many_there_are():
    for file in [file for file in ROOT.glob("[!.]*/*.py") if file.parent.name != "tests"] + list(ROOT.glob("*.py")):
        assert not re.search(r"\w\(s\)", file.read_text()), file


def test_the_nearest_name_is_meant_and_a_far_one_is_not():
    known = ("max_train_samples", "max_eval_samples", "seed")
    assert did_you_mean("max_train_sampels", known) == ": did you mean max_train_samples?"
    assert did_you_mean("sunshine", known) == ""
