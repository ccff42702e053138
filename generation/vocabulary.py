"""Which id of a language model stands for what: codes of a tokenizer, conditions, the null condition, padding."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from transformers.utils import cached_file

from eval.files import read_fields, write_whole
from reading.models import cannot_be_loaded


FILE = "vocabulary.json"  # beside the model's config.json
CONDITIONS = ("class", "text", "none")


@dataclass
class Vocabulary:
    """The ids of a generator. Codes come first, as they are, so that a token of an image is its own id; behind them

        condition "class":  classes | null | pad      an image is [class or null] + tokens
        condition "text":   text ids | null | begin | pad      [text ids or null] + [begin] + tokens
        condition "none":   null | pad      [null] + tokens

    There is no id for the end, an image has exactly `height * width` tokens, and `begin` only where texts of many
    lengths stand before it.

    Args:
        codebook_size: number of codes.
        height, width: of the grid, in tokens. Tokens are in raster order.
        condition: one of `CONDITIONS`.
        class_names: of condition "class", one for each class.
        text_size: of condition "text", number of ids of the text tokenizer, which is saved beside the model.
        max_text_tokens: of condition "text", longer texts are cut.
        has_null: whether images without their condition were trained on, as guidance needs it.
        tokenizer_hash: of the image tokenizer that the codes belong to, see generation/provenance.py.
        model_name_or_path, revision: where that tokenizer is.

    Raises:
        ValueError: fields that contradict each other.
    """

    codebook_size: int
    height: int
    width: int
    condition: str
    tokenizer_hash: str
    model_name_or_path: str
    revision: str | None = None
    class_names: list[str] | None = None
    text_size: int | None = None
    max_text_tokens: int | None = None
    has_null: bool = True

    def __post_init__(self):
        for name in ("codebook_size", "height", "width"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} of a vocabulary must be a positive integer, got {getattr(self, name)!r}.")
        if self.condition not in CONDITIONS:
            raise ValueError(f"condition must be one of {', '.join(CONDITIONS)}, got '{self.condition}'.")
        if (self.condition == "class") != bool(self.class_names):
            raise ValueError(f"class_names are {self.class_names!r}, and the condition is '{self.condition}'.")
        if (self.condition == "text") != bool(self.text_size and self.max_text_tokens):
            raise ValueError(
                f"text_size is {self.text_size!r}, max_text_tokens {self.max_text_tokens!r}, and the condition "
                f"'{self.condition}'."
            )
        if self.condition == "none" and not self.has_null:
            raise ValueError("condition 'none' has nothing but the null condition: has_null must be true.")

    # Ids -------------------------------------------------------------------------------------------------------------

    @property
    def num_conditions(self) -> int:
        """Ids between the codes and the null condition."""
        return len(self.class_names or ()) + (self.text_size or 0)

    @property
    def num_tokens(self) -> int:
        """Of an image."""
        return self.height * self.width

    @property
    def null(self) -> int | None:
        return self.codebook_size + self.num_conditions if self.has_null else None

    @property
    def begin(self) -> int | None:
        return self.codebook_size + self.num_conditions + self.has_null if self.condition == "text" else None

    @property
    def pad(self) -> int:
        return self.size - 1

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.codebook_size + self.num_conditions + self.has_null + (self.condition == "text") + 1

    @property
    def max_prompt(self) -> int:
        """Most ids before the tokens of an image."""
        return self.max_text_tokens + 1 if self.condition == "text" else 1

    # Sequences -------------------------------------------------------------------------------------------------------

    def prompt(self, condition: int | list[int] | None) -> list[int]:
        """What stands before the tokens of an image.

        Args:
            condition: number of a class, ids of a text as its tokenizer gives them, or `None`: the null condition.

        Raises:
            ValueError: there is no such class or id, or no null condition.
        """
        if condition is None:
            if not self.has_null:
                raise ValueError(
                    "This generator has no null condition, it was trained with --condition_dropout 0: pass a "
                    f"condition{'' if self.condition == 'text' else ', ' + self._classes()}."
                )
            ids = [self.null]
        elif self.condition == "class":
            if not 0 <= condition < self.num_conditions:
                raise ValueError(f"There is no class {condition}, the generator knows {self._classes()}.")
            ids = [self.codebook_size + condition]
        elif self.condition == "text":
            if not condition or not all(0 <= text_id < self.text_size for text_id in condition):
                raise ValueError(f"A text must have ids in [0, {self.text_size}), got {condition}.")
            ids = [self.codebook_size + text_id for text_id in condition[: self.max_text_tokens]]
        else:
            raise ValueError(f"This generator takes no condition, got {condition!r}.")
        return ids if self.begin is None else [*ids, self.begin]

    def to_sequence(self, tokens, condition: int | list[int] | None = None) -> list[int]:
        """The ids of an image.

        Args:
            tokens: (height, width) or (height * width,), integers in [0, codebook_size).
            condition: see `prompt`.

        Raises:
            ValueError: tokens of another grid or codebook; see also `prompt`.
        """
        return self.prompt(condition) + self._checked(torch.as_tensor(tokens).flatten()).tolist()

    def from_sequence(self, ids) -> tuple[int | list[int] | None, torch.Tensor]:
        """The condition and the tokens (height, width) of a sequence of ids, which may have padding on either side.

        Raises:
            ValueError: it is no sequence of this vocabulary.
        """
        ids = torch.as_tensor(ids)
        ids = ids[ids != self.pad].tolist()
        prompt, tokens = ids[: -self.num_tokens], torch.tensor(ids[-self.num_tokens :])
        tokens = self._checked(tokens).view(self.height, self.width)
        if self.begin is not None and prompt[-1:] == [self.begin]:
            prompt = prompt[:-1]
        condition = None
        if prompt != [self.null]:
            inside = [number - self.codebook_size for number in prompt]
            condition = inside if self.condition == "text" or len(inside) != 1 else inside[0]
        try:
            again = self.prompt(condition)
        except (TypeError, ValueError):
            again = None
        if ids[: -self.num_tokens] != again:
            raise ValueError(f"{ids[: -self.num_tokens]} is no condition of this vocabulary.")
        return condition, tokens

    def class_number(self, name: str) -> int:
        """The number of a class, by its name or its number as text.

        Raises:
            ValueError: there is none, or the generator knows no classes.
        """
        if self.condition != "class":
            raise ValueError(f"This generator knows no classes (its condition is '{self.condition}'), got '{name}'.")
        if name in self.class_names:
            return self.class_names.index(name)
        if name.isdecimal() and int(name) < len(self.class_names):
            return int(name)
        raise ValueError(f"There is no class '{name}', the generator knows {self._classes()}.")

    def _classes(self) -> str:
        names = [f"{name} ({number})" for number, name in enumerate(self.class_names)]
        return ", ".join(names if len(names) <= 20 else [*names[:18], "...", names[-1]])

    def _checked(self, tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) != self.num_tokens:
            raise ValueError(
                f"An image must have {self.height} x {self.width} = {self.num_tokens} tokens, got {len(tokens)}."
            )
        self.check_codes(tokens)
        return tokens

    def check_codes(self, tokens) -> None:
        """
        Raises:
            ValueError: an array or a tensor has numbers that are no codes.
        """
        if not 0 <= tokens.min() <= tokens.max() < self.codebook_size:
            raise ValueError(
                f"Tokens must be in [0, {self.codebook_size}), got {tokens.min()} to {tokens.max()}: are they of "
                "another tokenizer?"
            )

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes `vocabulary.json` into a folder."""
        write_whole(Path(folder) / FILE, lambda path: path.write_text(json.dumps(asdict(self), indent=2) + "\n"))

    @classmethod
    def load(cls, name_or_path: str | Path, revision: str | None = None) -> "Vocabulary":
        """Reads the `vocabulary.json` of a generator, in a folder or a repository of the hub.

        Raises:
            ValueError: there is none, or not one of this kind.
        """
        try:
            file = cached_file(str(name_or_path), FILE, revision=revision)
        except (OSError, HFValidationError) as error:
            if not Path(name_or_path).exists():
                raise ValueError(cannot_be_loaded(str(name_or_path), error)) from error
            what = " ".join(str(error).split())
            raise ValueError(f"{name_or_path} is no generator of generation/train.py, no {FILE}: {what}") from error
        content = read_fields(Path(file))
        known = {field.name for field in fields(cls)}
        if unknown := sorted(content.keys() - known):
            raise ValueError(f"{file} has unknown fields: {', '.join(unknown)}.")
        try:
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file} describes no vocabulary: {error}") from error
