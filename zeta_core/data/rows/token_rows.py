"""Reading rows of token ids, with the columns that mark padding and the tokens that are trained on.

Guarantee: a column that states something about the tokens is either used or rejected. Columns that cannot change what
is trained on are ignored and reported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from zeta_core.data.rows.row import describe_type, parsed_list

# The columns that are honoured, as written by Hugging Face's data collators (`labels`, `attention_mask`), by TRL
# (`completion_mask`, `assistant_masks`) and by `apply_chat_template(return_assistant_tokens_mask=True)`.
MASKS = ("labels", "completion_mask", "assistant_masks", "attention_mask")
NOT_TRAINED = -100  # the label of a token that is not trained on, which is the default of torch's cross_entropy
_TRAIN_ON_MASKS = {"assistant": "assistant_masks", "completion": "completion_mask"}
# Results of tokenizers that follow from the ids.
_HARMLESS = frozenset({"position_ids", "token_type_ids", "special_tokens_mask", "length"})
_MARKS_TOKENS = re.compile(r"mask|label|target|weight|loss|prompt|completion|response|answer|assistant|(^|_)ids?$")
_MARKS_A_PART = re.compile(r"weight|loss|prompt|completion|response|answer|source_len|target_len")


class InvalidTokenRow(Exception):
    """The reason why a row cannot be used, as the end of a sentence that starts with the location of the row."""


@dataclass(frozen=True)
class TokenRow:
    """The ids of a row without padding. ``trained_N`` marks the ids that are trained on; ``None`` means all."""

    ids_N: NDArray[Any]
    trained_N: NDArray[np.bool_] | None
    num_padding: int

    @property
    def supervised_N(self) -> NDArray[np.bool_]:
        """``trained_N`` as an array, without the first token."""
        if self.trained_N is not None:
            return self.trained_N
        return np.arange(len(self.ids_N)) > 0

    @property
    def is_trained_on(self) -> bool:
        return self.trained_N is None or bool(self.trained_N.any())


def read_token_row(
    row: Mapping[str, object], columns: Mapping[str, str], train_on: str | None, dtype: np.dtype[Any]
) -> TokenRow:
    """Read a row whose ``input_ids`` are valid. ``columns`` maps our column names to the data's.

    A token is trained on if every column allows it. The first token never is, because nothing precedes it. Raises
    `InvalidTokenRow`.
    """
    ids = cast("list[int]", row[columns.get("input_ids", "input_ids")])
    if max(ids, default=0) > np.iinfo(dtype).max:
        raise InvalidTokenRow("contains token ids of more than 32 bits; use ids of the model's vocabulary.")
    ids_N = np.asarray(ids, dtype=dtype)
    masks = masks_in(row, columns)
    _reject_other_marks(row, columns, len(ids))
    if (needed := _TRAIN_ON_MASKS.get(train_on or "", "")) and needed not in masks:
        instead = f"; {' and '.join(masks)} determine what is trained on" if masks else ""
        raise InvalidTokenRow(
            f"has no {needed!r}, and train_on is {train_on!r}{instead}. Remove train_on, or add {needed!r}."
        )
    trained_N = np.ones(len(ids_N), dtype=np.bool_)
    kept = slice(0, len(ids_N))
    for name, column in masks.items():
        values_N = _per_token(row[column], column, len(ids_N))
        if name == "labels":
            trained_N &= _labelled(values_N, ids_N, column)
            continue
        wrong = np.flatnonzero((values_N != 0) & (values_N != 1))
        if len(wrong):
            raise InvalidTokenRow(f"{column!r} contains {values_N[wrong[0]]}; use 0 and 1.")
        if name == "attention_mask":
            kept = _without_padding(values_N, column)
        else:
            trained_N &= values_N != 0
    ids_N, trained_N = ids_N[kept], trained_N[kept]
    num_padding = len(ids) - len(ids_N)
    if trained_N.all() or (len(ids_N) > 1 and trained_N[1:].all()):
        everything = len(ids_N) > 0 or not num_padding
        return TokenRow(ids_N, None if everything else trained_N, num_padding)
    if train_on == "all":
        names = " and ".join(repr(column) for name, column in masks.items() if name != "attention_mask")
        raise InvalidTokenRow(f"{names} excludes tokens, but train_on is 'all'; remove train_on or the column.")
    trained_N[:1] = False
    return TokenRow(ids_N, trained_N, num_padding)


def masks_in(row: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, str]:
    """The columns of a row that are honoured: our name and the data's. Raises `InvalidTokenRow` if one is missing."""
    for name in MASKS:
        if name in columns and columns[name] not in row:
            raise InvalidTokenRow(f"has no {columns[name]!r}, which columns names as {name!r}.")
    return {name: column for name in MASKS if (column := columns.get(name, name)) in row}


def may_mark_tokens(name: str, numeric: Collection[str]) -> bool:
    """Whether a column must be read to find out if it marks the tokens to train on. Only ``numeric`` ones can."""
    return name in numeric and name not in _HARMLESS


def unused_columns(row: Mapping[str, object], columns: Mapping[str, str]) -> Iterator[str]:
    used = {columns.get(name, name) for name in ("input_ids", *MASKS)}
    return (str(name) for name in row if name not in used)


@dataclass
class MaskPresence:
    """For each mask, the first row that has it, and the first one that lacks it.

    Either all rows have a mask, or none has it.
    """

    rows_with: dict[str, int] = field(default_factory=dict[str, int])
    rows_without: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, number: int, row: Mapping[str, object], columns: Mapping[str, str]) -> None:
        masks = masks_in(row, columns)
        for name in MASKS:
            (self.rows_with if name in masks else self.rows_without).setdefault(name, number)

    def merge(self, rows_with: Mapping[str, int], rows_without: Mapping[str, int]) -> None:
        """Add the columns of other rows."""
        for own, others in ((self.rows_with, rows_with), (self.rows_without, rows_without)):
            own.update({name: min(row, own.get(name, row)) for name, row in others.items()})

    @property
    def masks(self) -> list[str]:
        """The masks that rows have."""
        return [name for name in MASKS if name in self.rows_with]

    @property
    def inconsistent(self) -> tuple[str, int] | None:
        """A mask that only some rows have, and the first row that lacks it."""
        return next(((name, self.rows_without[name]) for name in self.rows_with if name in self.rows_without), None)


def _reject_other_marks(row: Mapping[str, object], columns: Mapping[str, str], num_ids: int) -> None:
    """Refuse columns that look like masks, labels or weights but are not used."""
    for column in unused_columns(row, columns):
        if column in _HARMLESS:
            continue
        value, name = parsed_list(row[column]), column.lower()
        if _are_numbers(value):
            is_named_so = _MARKS_TOKENS.search(name) and value is row[column]  # other text may look like a list
            marks = is_named_so or len(cast("list[object]", value)) == num_ids
        else:
            marks = isinstance(value, int | float) and _MARKS_A_PART.search(name)
        if marks:
            raise InvalidTokenRow(
                f"{column!r} looks like it marks the tokens to train on, but is not used. Add it to drop_columns, or "
                f'name its meaning with columns, such as {{"completion_mask": "{column}"}} (one of {", ".join(MASKS)}).'
            )


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, int | float) for v in cast("list[Any]", value))


def _per_token(value: object, column: str, num_ids: int) -> NDArray[Any]:
    """The values of a column as integers. Raises `InvalidTokenRow` unless there is one for each id."""
    if not isinstance(value, list):
        raise InvalidTokenRow(f"{column!r} is {describe_type(value)}; provide a list of one number per token id.")
    values = cast("list[object]", value)
    if len(values) != num_ids:
        raise InvalidTokenRow(f"{column!r} has {len(values)} values for {num_ids} token ids; provide one per id.")
    if not all(isinstance(item, int) and abs(item) < 1 << 62 for item in values):
        raise InvalidTokenRow(f"{column!r} is not a list of whole numbers.")
    return np.asarray(values, dtype=np.int64)


def _labelled(labels_N: NDArray[Any], ids_N: NDArray[Any], column: str) -> NDArray[np.bool_]:
    """The tokens whose label is their id. Raises `InvalidTokenRow` for a label other than that and `NOT_TRAINED`."""
    trained_N = labels_N == ids_N
    wrong = np.flatnonzero(~trained_N & (labels_N != NOT_TRAINED))
    if len(wrong):
        at = int(wrong[0])
        raise InvalidTokenRow(
            f"{column!r} contains {labels_N[at]} at position {at}, where the token id is {ids_N[at]}; each label must "
            f"be the id at the same position, or {NOT_TRAINED} for a token that is not trained on."
        )
    return cast("NDArray[np.bool_]", trained_N)


def _without_padding(attention_N: NDArray[Any], column: str) -> slice:
    """The range between the padding on both sides. Raises `InvalidTokenRow` for padding in the middle."""
    attended = np.flatnonzero(attention_N)
    if not len(attended):
        return slice(0, 0)
    first, last = int(attended[0]), int(attended[-1]) + 1
    if len(attended) != last - first:
        hole = first + int(np.argmin(attention_N[first:last]))
        raise InvalidTokenRow(
            f"{column!r} is 0 at position {hole}, between tokens with 1; padding must be at the beginning or the end."
        )
    return slice(first, last)
