"""README.md of a dataset of tokens, with a picture of decoded rows."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from huggingface_hub import DatasetCard, DatasetCardData

from eval.files import write_whole
from eval.pictures import save_rows
from generation.provenance import Provenance
from generation.shards import split_name
from modeling_simvq import ImageTokenizer
from reading.sources import is_on_hub, public_name


PICTURE = "decoded.png"
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
         (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"))  # fmt: skip
TEXT = """# {name}

Images as tokens: {num_images:,} images of {source}, split `{split}`, are {num_rows:,} rows here{unreadable}.

![rows, decoded]({picture})

Rows from all over the dataset, decoded.

## Use

```python
from datasets import load_dataset

rows = load_dataset("{name}", split="{split}")
row = rows.with_format("numpy")[0]
tokens = row["image_tokens"].reshape(row["height"], row["width"])  # row by row, in [0, {codebook_size})
```

`model.decode` of the tokenizer takes them back to pixels. With another tokenizer they mean nothing: the hash below is
that of the right one, and `python -m generation.tokens_info` checks it.

| column | content |
| --- | --- |
| `key` | name of the image in its source |
| `image_tokens` | {dtype}, flat, row by row |
| `height`, `width` | of the grid, in tokens of {patch_size} px |
| `crop` | 0; of ten crops 0 to 4: top left, top right, bottom left, bottom right, centre |
| `flipped` | whether the crop was mirrored |
{columns}

## How it was made

| | |
| --- | --- |
| tokenizer | {tokenizer} |
| hash of what decides tokens | `{tokenizer_hash}` |
| codes | {codebook_size:,} |
| images | {transform} |
| dtype of the encoder | {precision} |
| versions | {versions} |

All of it, for programs: `provenance.json`. Licence: {license}.
"""


def dataset_card(name: str, provenance: Provenance, columns: list[str], license: str | None = None) -> DatasetCard:
    """README.md.

    Args:
        name: of the dataset, for people and for `load_dataset`.
        provenance: finished.
        columns: of its rows.
        license: of the images, as the hub writes it ("cc-by-4.0"); `None`: it was not given.
    """
    split, source = split_name(provenance.split), public_name(provenance.source)
    data = DatasetCardData(
        license=license,
        pretty_name=name.split("/")[-1],
        tags=["image-tokens", "simvq"],
        task_categories=["text-to-image" if "text" in columns else "unconditional-image-generation"],
        size_categories=[next((size for most, size in SIZES if provenance.num_rows < most), "100B<n<1T")],
        configs=[{"config_name": "default", "data_files": [{"split": split, "path": f"{split}-*.parquet"}]}],
        source_datasets=[source] if is_on_hub(provenance.source) else None,
    )
    more = {"label": "class of the image", "text": "caption of the image"}
    wide = "uint16" if provenance.codebook_size <= 2**16 else "uint32"
    unread = f"; {provenance.num_unreadable:,} could not be read" if provenance.num_unreadable else ""
    text = TEXT.format(
        name=name,
        num_images=provenance.num_images,
        source=f"`{source}`",
        split=split,
        num_rows=provenance.num_rows,
        unreadable=unread,
        picture=PICTURE,
        codebook_size=provenance.codebook_size,
        dtype=wide,
        patch_size=provenance.patch_size,
        columns="\n".join(f"| `{column}` | {more[column]} |" for column in columns if column in more),
        tokenizer=f"`{public_name(provenance.model_name_or_path)}`"
        + (f", revision `{provenance.revision}`" if provenance.revision else ""),
        tokenizer_hash=provenance.tokenizer_hash,
        transform=_transform(provenance),
        precision=_precision(provenance),
        license=license or "that of the images, which was not given (`--license`)",
        versions=", ".join(f"{library} {version}" for library, version in provenance.versions.items()),
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n{text.replace(chr(10) * 3, chr(10) * 2)}")


def _transform(provenance: Provenance) -> str:
    if provenance.image_size is None:
        text = f"in their own sizes, cut to multiples of {provenance.patch_size} px"
    elif provenance.crops == 10:
        side = int(provenance.image_size * provenance.ten_crop_ratio)
        text = f"shorter side {side} px, ten crops of {provenance.image_size} px (corners and centre, also mirrored)"
    else:
        text = f"shorter side {provenance.image_size} px, centre crop"
    return text + ("; also mirrored" if provenance.flip else "")


def _precision(provenance: Provenance) -> str:
    share = provenance.share_changed_by_dtype
    return provenance.dtype + (f" ({share:.2%} of the first batch's tokens differ from fp32's)" if share else "")


def write_card(folder: Path, provenance: Provenance, columns: list[str], license: str | None = None) -> None:
    """Writes README.md to the folder of the dataset."""
    card = dataset_card(folder.resolve().name, provenance, columns, license)
    write_whole(folder / "README.md", lambda path: path.write_text(str(card)))


def spread_rows(shards: list[Path], count: int) -> list[np.ndarray]:
    """The tokens of `count` rows (all, if there are no more) from all over the dataset, (height, width) each."""
    lengths = [pq.read_metadata(shard).num_rows for shard in shards]
    total, grids, start = sum(lengths), [], 0
    wanted = sorted({number * total // count for number in range(count)})
    for shard, length in zip(shards, lengths):
        places = [place - start for place in wanted if start <= place < start + length]
        if places:
            for row in pq.read_table(shard, columns=["image_tokens", "height", "width"]).take(places).to_pylist():
                grids.append(np.array(row["image_tokens"]).reshape(row["height"], row["width"]))
        start += length
    return grids


@torch.inference_mode()
def draw_rows(model: ImageTokenizer, grids: list[np.ndarray], path: Path) -> None:
    """Writes a picture of decoded rows as a PNG; smaller ones stand in the middle of a white place.

    Args:
        model: their tokenizer.
        grids: see `spread_rows`.
        path: of the picture.
    """
    images = []
    for grid in grids:
        tokens = torch.from_numpy(grid.astype(np.int64))[None].to(model.device)
        images.append(model.decode(tokens).decoded_pixel_values[0].float().cpu())
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    places = []
    for image in images:
        below, right = height - image.shape[1], width - image.shape[2]
        around = (right // 2, right - right // 2, below // 2, below - below // 2)
        places.append(F.pad(image, around, value=1.0))
    save_rows([torch.stack(places)], path)
