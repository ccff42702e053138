"""Ids of a generator, and the rows that it is trained on."""

import json

import numpy as np
import pytest
import torch
from generators import CLASSES, write_tokens

from generation.rows import Collate, ImageSequences, frequency_models, grid_of, load_rows, split_keys
from generation.vocabulary import Vocabulary


def vocabulary(condition: str = "class", **fields) -> Vocabulary:
    """A grid of 2 x 3, 16 codes."""
    of = {"class": {"class_names": CLASSES}, "text": {"text_size": 5, "max_text_tokens": 3}, "none": {}}
    known = {"codebook_size": 16, "height": 2, "width": 3, "condition": condition, **of[condition]}
    return Vocabulary(**known | {"tokenizer_hash": "0" * 64, "model_name_or_path": "tokenizer"} | fields)


KINDS = {
    "class": [None, 0, 1, 2, 3],
    "text": [None, [0], [4, 0], [1, 2, 3]],
    "none": [None],
    "class without null": [0, 1, 2, 3],
    "text without null": [[4], [1, 2, 3]],
}


def of_kind(kind: str) -> Vocabulary:
    return vocabulary(kind.split()[0], has_null="without" not in kind)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_and_images_are_in_bijection(kind):
    """Each sequence comes back, all are different, and no id is left over or has two meanings."""
    words, seen = of_kind(kind), set()
    for condition in KINDS[kind]:
        for first in range(16):
            tokens = (torch.arange(6) + first).remainder(16).view(2, 3)
            ids = words.to_sequence(tokens, condition)
            for padding in ([], [words.pad] * 2):
                for padded in (ids + padding, padding + ids):
                    back, grid = words.from_sequence(padded)
                    assert back == condition and torch.equal(grid, tokens)
            seen.add(tuple(ids))
    assert len(seen) == 16 * len(KINDS[kind])
    assert ids[-6:] == tokens.flatten().tolist()  # a code is its own id
    special = {id for ids in seen for id in ids} | {words.pad}
    assert max(special) == words.size - 1
    if kind != "text without null":  # whose texts here do not have all ids
        assert special == set(range(words.size))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v: v.to_sequence([16] * 6), r"in \[0, 16\), got 16 to 16: are they of another tokenizer"),
        (lambda v: v.to_sequence([-1] * 6), "got -1 to -1"),
        (lambda v: v.to_sequence([0] * 5), "2 x 3 = 6 tokens, got 5"),
        (lambda v: v.prompt(4), r"no class 4, the generator knows dots \(0\), flat \(1\)"),
        (lambda v: v.class_number("zebra"), "no class 'zebra', the generator knows dots"),
        (lambda v: v.class_number("4"), "no class '4'"),
        (lambda v: v.from_sequence([3] * 7), "no condition of this vocabulary"),
        (lambda v: v.from_sequence([v.null] * 7), "are they of another tokenizer"),
        (lambda v: of_kind("class without null").prompt(None), "no null condition.*--condition_dropout 0"),
        (lambda v: vocabulary("text").prompt([5]), r"in \[0, 5\), got \[5\]"),
        (lambda v: vocabulary("none").prompt(0), "takes no condition, got 0"),
        (lambda v: vocabulary("none").class_number("dots"), "knows no classes"),
        (lambda v: vocabulary(class_names=None), "class_names are None"),
        (lambda v: vocabulary(height=0), "height of a vocabulary must be a positive integer, got 0"),
        (lambda v: vocabulary(condition="text", text_size=0), "text_size is 0"),
        (lambda v: vocabulary("none", has_null=False), "has_null must be true"),
    ],
)
def test_what_a_vocabulary_has_not_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(vocabulary())


def test_classes_have_names_and_numbers():
    assert [vocabulary().class_number(name) for name in ("flat", "1", "stripes", "3")] == [1, 1, 3, 3]
    digits = vocabulary(class_names=["7", "0"])  # a name goes before a number
    assert [digits.class_number(name) for name in ("7", "0", "1")] == [0, 1, 1]


def test_a_vocabulary_comes_back_from_its_file(tmp_path):
    for kind in KINDS:
        of_kind(kind).save(tmp_path)
        assert Vocabulary.load(tmp_path) == of_kind(kind)
    content = json.loads((tmp_path / "vocabulary.json").read_text())
    for broken, message in (
        (content | {"colour": 1}, "unknown fields: colour"),
        ({**content, "height": "2"}, "describes no vocabulary: height"),
        ({"codebook_size": 16}, "describes no vocabulary"),
    ):
        (tmp_path / "vocabulary.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            Vocabulary.load(tmp_path)
    (tmp_path / "vocabulary.json").unlink()
    with pytest.raises(ValueError, match="is no generator of generation/train.py, no vocabulary.json"):
        Vocabulary.load(tmp_path)
    with pytest.raises(ValueError, match="There is no folder .*nowhere"):
        Vocabulary.load(tmp_path / "nowhere")


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """30 images with 4 crops each; every crop has another first token, and the image's number in the second."""
    tokens = torch.zeros(30, 4, 2, 3, dtype=torch.long)
    tokens[:, :, 0, 0] = torch.arange(4)
    tokens[:, :, 0, 1] = torch.arange(30)[:, None] % 16
    return write_tokens(tmp_path / "tokens", tokens, labels=[i % 4 for i in range(30)])


def test_an_epoch_has_each_image_once_with_a_crop_drawn_by_seed_epoch_and_key(folder):
    rows, _ = load_rows(folder)
    keys = [f"{i:04d}" for i in range(3, 30)]
    sequences = ImageSequences(rows, keys, vocabulary(), condition_dropout=0.3, seed=5)
    epochs = []
    for epoch in range(40):
        sequences.draws.set_epoch(epoch)
        epochs.append([sequences[i]["input_ids"] for i in range(len(sequences))])
        for number, ids in enumerate(epochs[-1], start=3):
            assert ids[2] == number % 16 and ids[0] in (sequences.vocabulary.null, 16 + number % 4)
    crops = np.array([[ids[1] for ids in epoch] for epoch in epochs])
    assert all(len(set(column)) == 4 for column in crops.T)  # of each image, all crops in turn
    dropped = np.array([[ids[0] == sequences.vocabulary.null for ids in epoch] for epoch in epochs])
    assert 0.25 < dropped.mean() < 0.35
    few = ImageSequences(rows, keys[10:12], vocabulary(), condition_dropout=0.3, seed=5)
    few.draws.set_epoch(7)
    assert [few[i]["input_ids"] for i in range(2)] == epochs[7][10:12]  # whatever else there is
    few = ImageSequences(rows, keys, vocabulary(), condition_dropout=0.3, seed=6)
    assert [few[i]["input_ids"] for i in range(27)] != epochs[0]


def test_all_crops_of_an_image_are_on_one_side_and_stay_there(folder):
    rows, _ = load_rows(folder)
    train, held_out = split_keys(rows, 0.2)
    assert len(held_out) == 6 and len(train) == 24 and not {*train} & {*held_out}
    _, fewer = split_keys(rows.filter(lambda row: row["key"] in {*train[:-4], *held_out}), 0.2)
    assert {*fewer} <= {*held_out}
    with pytest.raises(ValueError, match="leaves none to train on"):
        split_keys(rows, 0.99)


def test_the_loss_is_of_the_tokens_of_images_alone():
    words = vocabulary("text")
    items = [words.to_sequence([1] * 6, condition) for condition in ([4], [0, 1, 2], None)]
    batch = Collate(words)([{"input_ids": ids, "prompt": len(ids) - 6} for ids in items])
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 10)
    assert torch.equal((batch["labels"] == 1).sum(1), torch.tensor([6, 6, 6]))
    assert torch.equal(batch["labels"] != -100, (batch["input_ids"] == 1))
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([8, 10, 8]))


@pytest.mark.parametrize("most_rows", [1000, 40])
def test_models_of_frequencies_are_those_counted_by_hand(tmp_path, most_rows):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 16, (30, 2, 2, 3), generator=generator).square() // 16
    rows, _ = load_rows(write_tokens(tmp_path / "tokens", tokens))
    keys, words = [f"{i:04d}" for i in range(30)], vocabulary("none")
    train, held_out = ImageSequences(rows, keys[:25], words), ImageSequences(rows, keys[25:], words)
    counted = tokens[:25].reshape(50, 6)
    if most_rows == 40:
        counted = counted[np.linspace(0, 49, 40).astype(int)]
    nats = {"unigram": 0.0, "bigram": 0.0}
    for index in range(5):
        row = held_out[index]["input_ids"][1:]
        for place, code in enumerate(row):
            alone = ((counted == code).sum() + 1) / (counted.numel() + 16)
            behind = alone
            if place:
                before = counted[:, :-1] == row[place - 1]
                behind = ((before & (counted[:, 1:] == code)).sum() + 1) / (before.sum() + 16)
            nats["unigram"] -= alone.log().item() / 30
            nats["bigram"] -= behind.log().item() / 30
    found = frequency_models(train, held_out, most_rows)
    assert found["unigram"] == pytest.approx(nats["unigram"]) and found["bigram"] == pytest.approx(nats["bigram"])
    assert found["counted_rows"] == len(counted)


def test_rows_of_several_grids_and_folders_without_tokens_are_named(tmp_path, folder):
    rows, _ = load_rows(folder)
    assert grid_of(rows, "them") == (2, 3)
    with pytest.raises(ValueError, match=r"grids of several sizes.*heights \[2, 4\], widths \[3\]"):
        grid_of(rows.map(lambda row, number: {"height": 2 + 2 * (number == 3)}, with_indices=True), "them")
    with pytest.raises(ValueError, match="no .parquet files.*python -m generation.tokenize_images"):
        load_rows(tmp_path)
    (folder / "provenance.json").unlink()
    with pytest.raises(ValueError, match="provenance.json"):
        load_rows(folder)
