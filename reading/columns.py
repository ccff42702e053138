"""Which columns of a dataset hold images, labels and captions, and how they become `image`, `label` and `text`."""

import datasets
import pyarrow as pa

from reading.wording import did_you_mean


WANTED = ("image", "label", "text")
# What columns are called, the likeliest first; also of fields of a struct, as `.json` beside an image is one. Images in
# tars are called by their suffixes.
USUAL = {
    "image": ("image", "img", "picture", "photo", "image_bytes"),
    "label": ("label", "labels", "cls", "class", "class_id", "class_label", "class_name", "category", "target"),
    "text": ("text", "caption", "txt", "prompt", "description"),
}
WHAT = {"image": "images", "label": "labels", "text": "captions"}


def bring_columns(dataset, name: str, wanted: tuple[str, ...], given: dict[str, str | None]):
    """A dataset with the columns `image`, encoded images, `label` and `text`, as far as it has them and they are
    wanted.

    Args:
        dataset: a `Dataset` or an `IterableDataset`.
        name: of its source, for messages.
        wanted: some of these three.
        given: the names that they have here, or `None`: then it is the column of the type (`Image`, `ClassLabel`),
            if there is but one, or else one with a usual name (`USUAL`) and a type that does. `json.caption` is a field
            of the column `json`.

    Returns:
        The dataset; and a sentence that says which columns they are, or "" if they already had these names.

    Raises:
        ValueError: no such column, none of images, or several.
    """
    fields = _fields(dataset.features or {})
    if not fields:  # a stream may not know its columns before it is read
        chosen = {role: given[role] for role in wanted if given[role]} | {"image": given["image"] or "image"}
    else:
        chosen = {role: _choose(role, fields, name, given[role]) for role in wanted}
        chosen = {role: column for role, column in chosen.items() if column}
    if len(set(chosen.values())) < len(chosen):
        raise ValueError(f"{name}: images, labels and captions must be different columns, got {chosen}.")
    dataset = _select(dataset, chosen)
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    if "label" in chosen and isinstance(dataset, datasets.Dataset):
        dataset = with_classes(dataset)
    if all(role == column for role, column in chosen.items()):
        return dataset, ""
    told = [f"{WHAT[role]} from '{column}'" for role, column in chosen.items()]
    return dataset, f"{name}: {', '.join(told)}."


def _fields(features: dict) -> dict:
    """Types of all columns, and of the fields of structs as "column.field"."""
    inner = {
        f"{column}.{field}": kind
        for column, fields in features.items()
        if isinstance(fields, dict)
        for field, kind in fields.items()
    }
    return inner | dict(features)


def _is_string(kind) -> bool:
    return isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")


def _can_be(role: str, kind) -> bool:
    """Whether a column of this type can be images, labels or captions."""
    if role == "image":
        is_struct = isinstance(kind, dict) and {"bytes", "path"} <= kind.keys()
        is_value = isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary", "string", "null")
        return isinstance(kind, datasets.Image) or is_struct or is_value
    if role == "label":
        is_integer = isinstance(kind, datasets.Value) and pa.types.is_integer(kind.pa_type)
        return isinstance(kind, datasets.ClassLabel) or is_integer or _is_string(kind)
    return _is_string(kind)


def _choose(role: str, fields: dict, name: str, given: str | None) -> str | None:
    columns = [column for column in fields if column.split(".")[0] not in fields or "." not in column]
    if given:
        if given not in fields:
            meant = did_you_mean(given, columns) or "."
            raise ValueError(f"{name} has no column '{given}', only {', '.join(columns)}{meant}")
        if not _can_be(role, fields[given]):
            raise ValueError(f"Column '{given}' of {name} holds no {WHAT[role]}, its type is {fields[given]}.")
        return given
    by_name = [
        column
        for usual in USUAL[role]
        for column in (usual, *(nested for nested in fields if role != "image" and nested.endswith(f".{usual}")))
        if column in fields and _can_be(role, fields[column])
    ]
    if role in by_name:
        return role
    kinds = {"image": datasets.Image, "label": datasets.ClassLabel}
    by_kind = [column for column, kind in fields.items() if role in kinds and isinstance(kind, kinds[role])]
    if role == "image" and len(by_kind) > 1:
        raise ValueError(f"{name} has several columns of images, {', '.join(by_kind)}: --image_column says which.")
    found = by_kind if len(by_kind) == 1 else by_name
    if role == "image" and not found:
        if "image_tokens" in fields:
            raise ValueError(
                f"{name} is a dataset of tokens (it has a column 'image_tokens'), where images are needed."
            )
        raise ValueError(f"{name} has no column of images, only {', '.join(columns)}: --image_column names it.")
    return next(iter(found), None)


def _select(dataset, chosen: dict[str, str]):
    """The chosen columns alone, under the names of their roles."""
    columns = dataset.features or {}
    if columns and any(column not in columns for column in chosen.values()):  # fields of structs
        if isinstance(dataset, datasets.Dataset):
            dataset = dataset.flatten()
        else:
            kinds = _fields(columns)
            kinds = {role: kinds[column] for role, column in chosen.items()} | {"image": datasets.Image(decode=False)}
            dataset = dataset.cast_column(chosen["image"], datasets.Image(decode=False))
            options = {"remove_columns": list(columns), "features": datasets.Features(kinds)}
            return dataset.map(_picked, fn_kwargs={"chosen": chosen}, **options)
    renamed = {column: role for role, column in chosen.items() if column != role}
    return dataset.select_columns(list(chosen.values())).rename_columns(renamed)


def _picked(row: dict, chosen: dict[str, str]) -> dict:
    values = {}
    for role, column in chosen.items():
        outer, _, inner = column.partition(".")
        values[role] = row[column] if column in row else (row[outer] or {}).get(inner)
    return values


def with_classes(dataset: datasets.Dataset) -> datasets.Dataset:
    """A dataset with a column `label`, whose labels, if they are strings, become a `ClassLabel`; the other columns are
    not written anew."""
    if not _is_string(dataset.features["label"]):
        return dataset
    names = sorted(name for name in dataset.unique("label") if name is not None)
    numbers = {name: number for number, name in enumerate(names)}
    labels = [numbers.get(name) for name in dataset["label"]]
    order = dataset.column_names
    dataset = dataset.remove_columns("label").add_column("label", labels, feature=datasets.ClassLabel(names=names))
    return dataset.select_columns(order)
