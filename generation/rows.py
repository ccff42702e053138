"""Rows of a token dataset as the sequences that a generator is trained on."""

import hashlib
from pathlib import Path

import datasets
import numpy as np
import torch

from generation.provenance import Provenance
from generation.vocabulary import Vocabulary
from reading.columns import with_classes
from reading.wording import counted


def load_rows(folder: str | Path) -> tuple[datasets.Dataset, Provenance]:
    """A token dataset, see generation/provenance.py.

    Raises:
        ValueError: it is none.
    """
    files = sorted(str(file) for file in Path(folder).glob("*.parquet"))
    if not files:
        raise ValueError(
            f"{folder} has no .parquet files, it is no dataset of tokens: make one of images by `python -m "
            "generation.tokenize_images`, and name its folder here."
        )
    rows = datasets.Dataset.from_parquet(files)
    if missing := {"key", "image_tokens", "height", "width"} - {*rows.column_names}:
        raise ValueError(f"{folder} is no dataset of tokens: it has no column {', '.join(sorted(missing))}.")
    provenance = Provenance.load(folder)
    if not provenance.finished:
        raise ValueError(f"{folder} is not finished: give the command that makes it again, it goes on where it was.")
    if "label" in rows.column_names:  # a stream has names of classes, and no list of them
        rows = with_classes(rows)
    return rows, provenance


def grid_of(rows: datasets.Dataset, whose: str | Path) -> tuple[int, int]:
    """Height and width that all rows have, in tokens.

    Raises:
        ValueError: they have several.
    """
    heights, widths = (sorted(rows.unique(side)) for side in ("height", "width"))
    if len(heights) != 1 or len(widths) != 1:
        raise ValueError(
            f"The rows of {whose} have grids of several sizes, or there are none (heights {heights}, widths {widths}): "
            "a generator needs one. Make tokens of images with an --image_size."
        )
    return heights[0], widths[0]


def split_keys(rows: datasets.Dataset, holdout: float) -> tuple[list[str], list[str]]:
    """Keys of images to train on and to hold out: a share, of the smallest hashes, so that an image stays on its side
    where others are added.

    Raises:
        ValueError: one side would be empty.
    """
    keys = sorted(rows.unique("key"), key=lambda key: _hash(key, "held out"))
    count = max(round(len(keys) * holdout), 1)
    if count >= len(keys):
        raise ValueError(f"holdout {holdout} of {counted(len(keys), 'image')} leaves none to train on.")
    return sorted(keys[count:]), sorted(keys[:count])


def _hash(*parts) -> int:
    """64 bits of what is decided by `parts` alone, on any machine and in any process."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Draws:
    """What is drawn by seed, epoch and key, alike on any machine and in any process. It is no method of the dataset:
    accelerate would tell one named `set_epoch` of epochs of its own."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that run already see it

    def set_epoch(self, epoch: int) -> None:
        """Other draws from here on."""
        self.epoch.fill_(epoch)

    def number(self, what: str, key: str) -> int:
        """64 bits."""
        return _hash(what, self.seed, self.epoch.item(), key)


class ImageSequences(torch.utils.data.Dataset):
    """One item for each image, whatever the number of its rows (crops, flips): in each epoch one of these is drawn, and
    with probability `condition_dropout` the condition becomes the null condition. Both are decided by seed, epoch and
    key alone.

    Args:
        rows: of a token dataset.
        keys: of the images.
        vocabulary: of the generator; rows must be of its grid and codebook.
        encode_text: gives ids of a text; of condition "text".
        condition_dropout: a probability.
        seed: of the draws.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        keys: list[str],
        vocabulary: Vocabulary,
        encode_text=None,
        condition_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.rows = rows.with_format("arrow")
        self.keys, self.vocabulary, self.encode_text = keys, vocabulary, encode_text
        self.condition_dropout, self.draws = condition_dropout, Draws(seed)
        column = rows.select_columns("key").with_format("arrow")[:]["key"].combine_chunks().dictionary_encode()
        codes = column.indices.to_numpy()
        order = np.argsort(codes, kind="stable")
        ends = np.cumsum(np.bincount(codes))
        number = {key: i for i, key in enumerate(column.dictionary.to_pylist())}
        self._rows_of = [order[ends[i - 1] if i else 0 : ends[i]] for i in (number[key] for key in keys)]

    def __len__(self) -> int:
        return len(self.keys)

    def row_number(self, index: int) -> int:
        """The row that is drawn for an image."""
        rows = self._rows_of[index]
        return int(rows[self.draws.number("row", self.keys[index]) % len(rows)])

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row, condition = self.rows[self.row_number(index)], None  # a table, which is much faster than a dict of it
        draw = self.draws.number("dropout", self.keys[index]) / 2**64
        if self.vocabulary.condition != "none" and draw >= self.condition_dropout:
            column = "label" if self.vocabulary.condition == "class" else "text"
            condition = row[column][0].as_py()
            condition = condition if column == "label" else self.encode_text(condition)
        ids = self.vocabulary.to_sequence(_tokens_of(row)[0], condition)
        return {"input_ids": ids, "prompt": len(ids) - self.vocabulary.num_tokens}


class Collate:
    """Sequences to a batch, padded on the right; the loss is of the tokens of images alone."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        ids = torch.full((len(items), longest), self.vocabulary.pad)
        labels = torch.full_like(ids, -100)
        for row, item in enumerate(items):
            end = len(item["input_ids"])
            ids[row, :end] = torch.tensor(item["input_ids"])
            labels[row, item["prompt"] : end] = ids[row, item["prompt"] : end]
        batch = {"input_ids": ids, "labels": labels}
        if self.vocabulary.condition == "text":
            batch["attention_mask"] = (ids != self.vocabulary.pad).long()
        return batch


# Models that know nothing but frequencies -----------------------------------------------------------------------------

MOST_ROWS = 200_000  # for counts


def frequency_models(
    train: ImageSequences, held_out: ImageSequences, most_rows: int = MOST_ROWS
) -> dict[str, float | int]:
    """Nats a token on the rows of `held_out` of two models whose probabilities are counts plus one: a code's own
    (unigram), and that of a code behind the one before it in the row (bigram; of the first code the unigram's).

    Args:
        train: whose rows are counted, all crops of its images; evenly spaced ones where there are more than
            `most_rows`.
        held_out: the rows that it draws in its present epoch are measured.

    Returns:
        `unigram` and `bigram` in nats a token, and `counted_rows`.
    """
    codes = train.vocabulary.codebook_size
    chosen = np.sort(np.concatenate(train._rows_of))
    if len(chosen) > most_rows:
        chosen = chosen[np.linspace(0, len(chosen) - 1, most_rows).astype(np.int64)]
    measured = _tokens(held_out, [held_out.row_number(i) for i in range(len(held_out))])
    pairs, where = np.unique(_pairs(measured, codes), return_inverse=True)
    single, double = np.zeros(codes, np.int64), np.zeros(len(pairs), np.int64)
    before = np.zeros(codes, np.int64)  # how often a code has another one behind it
    for start in range(0, len(chosen), 10_000):
        tokens = _tokens(train, chosen[start : start + 10_000])
        single += np.bincount(tokens.ravel(), minlength=codes)
        before += np.bincount(tokens[:, :-1].ravel(), minlength=codes)
        counted = _pairs(tokens, codes).ravel()
        found = np.searchsorted(pairs, counted).clip(max=len(pairs) - 1) if len(pairs) else counted[:0]
        double += np.bincount(found[pairs[found] == counted[: len(found)]], minlength=len(pairs))
    alone = -np.log((single + 1) / (single.sum() + codes))
    behind = -np.log((double[where.ravel()] + 1) / (before[measured[:, :-1].ravel()] + codes))
    return {
        "unigram": float(alone[measured].mean()),
        "bigram": float((alone[measured[:, 0]].sum() + behind.sum()) / measured.size),
        "counted_rows": len(chosen),
    }


def _tokens(sequences: ImageSequences, rows) -> np.ndarray:
    tokens = _tokens_of(sequences.rows[rows])
    sequences.vocabulary.check_codes(tokens)
    return tokens


def _tokens_of(table) -> np.ndarray:
    """(rows, tokens) of an Arrow table."""
    flat = table["image_tokens"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.int64).reshape(len(table), -1)


def _pairs(tokens: np.ndarray, codes: int) -> np.ndarray:
    return tokens[:, :-1] * codes + tokens[:, 1:]
