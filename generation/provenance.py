"""Which tokenizer tokens belong to, and how a dataset of them was made."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from eval.files import read_fields, write_whole
from modeling_simvq import ImageTokenizer
from reading.models import tokenizer_hash
from reading.sources import public_name


PROVENANCE = "provenance.json"
RUN = "run.json"  # how fast the latest run was: no part of the dataset


# packages, beside this repository, that decide tokens: what reads, resizes and encodes images, and writes rows
OF_TOKENS = ("torch", "torchvision", "transformers", "datasets", "pillow", "pyarrow")


def check_tokenizer(model: ImageTokenizer, expected_hash: str, whose: str) -> None:
    """Whether a model is the tokenizer that something was made with.

    Args:
        model: in fp32, as `tokenizer_hash` needs it; what was rounded to bf16 has another hash.
        expected_hash: `tokenizer_hash` of the right one.
        whose: what that is of, for the error: "tokens/", "the generator runs/emoji".

    Raises:
        ValueError: it is another one; both hashes are named.
    """
    found = tokenizer_hash(model)
    if found != expected_hash:
        raise ValueError(
            f"{whose} belongs to the tokenizer with hash {expected_hash}, but the model given has {found}: its tokens "
            "mean other codes. Name the tokenizer that it was made with."
        )


@dataclass
class Provenance:
    """How a dataset of tokens was made: its provenance.json, written when the first shard is begun and finished last.

    Args:
        model_name_or_path, revision: the tokenizer, as it was named; the commit of one of the hub.
        tokenizer_hash: what decides its tokens, see `tokenizer_hash`.
        codebook_size: tokens are in [0, codebook_size).
        patch_size: side of a token in pixels.
        image_size: side of the square crops in pixels. `None`: every image in its own size.
        crops: 1, the centre; or 10, see `Views`.
        ten_crop_ratio: shorter side in front of ten crops, over `image_size`. `None` for one crop.
        flip: every crop also mirrored (ten crops are, always).
        resample: the filter with which images are resized, a number of Pillow's.
        dtype: of the encoder, "float32" or "bfloat16".
        share_changed_by_dtype: of the first batch's tokens, those that differ from fp32's; `None` where it had
            no readable image.
        batch_size, shard_size: rows at a time in the encoder; images in a shard.
        source, split: what was read, as it was named.
        source_hash: see `source_hash` in generation/source.py.
        max_samples: images that were read at most.
        label_names: of the classes, in the order of their numbers. `None`: there are no names.
        versions: of libraries.
        num_images, num_unreadable, num_rows: images of the source, those of them that gave no row, and rows; `None`
            until all are there.
    """

    model_name_or_path: str
    revision: str | None
    tokenizer_hash: str
    codebook_size: int
    patch_size: int
    image_size: int | None
    crops: int
    ten_crop_ratio: float | None
    flip: bool
    resample: int
    dtype: str
    share_changed_by_dtype: float | None
    batch_size: int
    shard_size: int
    source: str
    split: str
    source_hash: str
    max_samples: int | None
    label_names: list[str] | None
    versions: dict[str, str]
    num_images: int | None = None
    num_unreadable: int | None = None
    num_rows: int | None = None

    @property
    def finished(self) -> bool:
        """Whether all rows are there."""
        return self.num_rows is not None

    @property
    def rows_of_image(self) -> int:
        """How many rows an image has: ten for ten crops, two where a single one is mirrored."""
        return self.crops * (2 if self.flip else 1)

    def public(self) -> "Provenance":
        """What others may read of it: of paths on this machine the last part alone."""
        source, tokenizer = public_name(self.source), public_name(self.model_name_or_path)
        return replace(self, source=source, model_name_or_path=tokenizer)

    @classmethod
    def load(cls, folder: str | Path) -> "Provenance":
        """
        Raises:
            ValueError: the folder has no provenance.json, or none that this class wrote.
        """
        path = Path(folder) / PROVENANCE
        if not path.is_file():
            raise ValueError(f"{folder} has no {PROVENANCE}: it is no dataset of python -m generation.tokenize_images.")
        content = read_fields(path)
        if different := content.keys() ^ {field.name for field in fields(cls)}:
            raise ValueError(
                f"{path} is of another version: it lacks, or has beside what is known, {sorted(different)}."
            )
        return cls(**content)

    def save(self, folder: str | Path) -> None:
        """Writes provenance.json to the folder, which is made."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_whole(Path(folder) / PROVENANCE, lambda path: path.write_text(text))
