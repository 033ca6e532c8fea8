"""Determining which columns of a row are used and which are not.

This is the only place that compares the columns that are present with those that are used. A column that is not used
but looks like a part of the prompt, or like a mask, is an error, because training without it would teach something
else. It is accepted if it is empty, if the used columns contain its text, or if the source names it in `drop_columns`.
Other columns are reported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from zeta_core.data.rows.formats import COLUMNS, RowFormat, candidate_formats, column_in, required
from zeta_core.data.rows.shapes import SHAPE_COLUMNS, Shape, detect_shape, normalized
from zeta_core.data.rows.token_rows import may_mark_tokens

Fields = Mapping[str, object]

_QUALIFIERS = r"(?:user|system|input|chat|dialog|dialogue|conversation|few_?shot|original|full|raw)"
_PARTS = (
    r"(?:system|developer|persona|prompts?|inputs?|instructions?|questions?|query|queries|problems?|history|context|"
    r"contexts|messages|conversations?|dialogues?|dialogs?|turns|tools|functions|reasoning_content|thinking)"
)
_LOOKS_LIKE_PROMPT = re.compile(rf"(?:{_QUALIFIERS}_)?{_PARTS}(?:_(?:text|content|messages?|prompts?|history))?")
_LOOKS_LIKE_MASK = re.compile(r"labels|(?:.*_)?masks?")
_MAX_NAMES = 12
# If a user maps columns of a format (key), the format of the shapes that the row may have.
_SHAPES_FOR = {"prompt_completion": "messages", "text": "messages", "preference": "preference"}


@dataclass(frozen=True)
class Layout:
    """How the rows of a source are read: their format, and their shape if that is not the format's own."""

    row_format: RowFormat
    shape: Shape | None = None

    def used_columns(self, row: Fields, columns: Mapping[str, str]) -> dict[str, str]:
        """The used columns of a row, as a mapping from standard names to the names in the data."""
        if self.shape is not None:
            return self.shape.used_columns(row)
        named = {name: column_in(row, name, columns) for name in COLUMNS[self.row_format]}
        return {name: column for name, column in named.items() if column in row}


def detect_layout(row: Fields, columns: Mapping[str, str], row_format: RowFormat | None, method: str) -> Layout | None:
    """The layout of a row; ``row_format`` is the format that the spec names, or ``None`` for ``auto``."""
    if row_format == "tokens":
        return Layout("tokens")
    formats = candidate_formats(columns, method) if row_format is None else (row_format,)
    for candidate in formats:
        if all(column_in(row, name, columns) in row for name in required(candidate)):
            if candidate == "preference" and column_in(row, "prompt", columns) not in row:
                shape = detect_shape(row, ["preference"])  # its prompt has another name
                return Layout(candidate, shape)
            return Layout(candidate)
    shape = detect_shape(row, [candidate for candidate in formats if candidate in ("messages", "preference")])
    return None if shape is None else Layout(shape.row_format, shape)


def columns_to_read(
    names: Collection[str],
    numeric: Collection[str],
    layout: Layout | None,
    columns: Mapping[str, str],
    drop: Collection[str],
) -> list[str]:
    """The columns of a table that must be read; without a ``layout``, all columns that may determine it.

    ``numeric`` columns may contain numbers or lists of numbers, which may mark the tokens to train on.
    """
    row: Fields = dict.fromkeys(names, "")
    if layout is not None and layout.row_format == "tokens":
        used = set(layout.used_columns(row, columns).values())
        return [name for name in names if name not in drop and (name in used or may_mark_tokens(name, numeric))]
    if layout is None:
        known = {*columns.values(), *(name for several in COLUMNS.values() for name in several), "conversations"}
        used = {name for name in names if name in known or normalized(name) in SHAPE_COLUMNS}
    else:
        used = set(layout.used_columns(row, columns).values())
        if layout.row_format == "messages" and layout.shape is None:
            used |= {"conversations"}  # stands for `messages` in rows without them
    return [name for name in names if name not in drop and (name in used or looks_used(name))]


def looks_used(name: str) -> bool:
    """Whether a column looks like a part of the prompt, or like a mask."""
    plain = normalized(name)
    return bool(_LOOKS_LIKE_PROMPT.fullmatch(plain) or _LOOKS_LIKE_MASK.fullmatch(plain)) or plain == "label"


def lost_column(row: Fields, used: Mapping[str, str]) -> str | None:
    """The first unused column that looks like a used one and has content that the used columns lack."""
    names = set(used.values())
    contained: str | None = None
    for name, value in row.items():
        if name in names or value is None or value in ("", [], {}) or not looks_used(name):
            continue
        if normalized(name) == "label" and not isinstance(value, bool):
            continue  # a class label; KTO's labels, which mark bad answers, are true or false
        if contained is None:
            contained = "\n".join(text for column in names for text in _texts(row[column]))
        texts = list(_texts(value))
        if not texts or not all(text.strip() in contained for text in texts):
            return name
    return None


def explain_lost(name: str, row: Fields, layout: Layout, used: Mapping[str, str], at: str) -> str:
    """Explain the fault in a row whose column ``name`` is not used, with a setting that the user can paste.

    ``at`` is the field of the source in the spec.
    """
    kind = layout.row_format if layout.shape is None else f"{layout.shape.name}"
    is_mask = _LOOKS_LIKE_MASK.fullmatch(normalized(name)) or normalized(name) == "label"
    role = "a mask or label" if is_mask else "a part of the prompt"
    standard = _standard_name(name, layout, used)
    shape = None if layout.shape is not None else detect_shape(row, [_SHAPES_FOR.get(layout.row_format, "")])
    fixes = [f"--set '{at}.columns.{standard}={name}' to use it as {standard!r}"] if standard else []
    fixes.append(f"--set '{at}.drop_columns=[{name}]' to train without it")
    if shape is not None and name in shape.used_columns(row).values():
        settings = f"--set '{at}.columns={{}}' --set '{at}.format={shape.row_format}'"
        fixes.append(f"{settings} to use all columns of {shape.name} rows")
    elif not standard and not is_mask:
        fixes.append("put its text into the used columns")
    names = ", ".join(list(used.values())[:_MAX_NAMES])
    return (
        f"has the column {name!r}, which looks like {role} but is not used: {kind} rows use {names}. Add "
        f"{', or '.join(fixes)}."
    )


def explain_unknown(row: Fields, at: str) -> str:
    """Explain the fault in a row whose columns match no known format."""
    found = ", ".join(sorted(map(str, row))[:_MAX_NAMES]) or "none"
    if "input_ids" in row:
        return "has 'input_ids' instead of 'text'; set use_pretokenized to train on rows of token ids."
    texts = [name for name, value in row.items() if isinstance(value, str) and value.strip()]
    example = texts[0] if len(texts) == 1 else "NAME"
    return (
        f"no usable columns (found: {found}). Expected text, messages, prompt + completion, chosen + rejected, or "
        f"a known pair such as instruction + output or question + answer. Name the columns, as in "
        f"--set '{at}.columns.text={example}'."
    )


def _standard_name(name: str, layout: Layout, used: Mapping[str, str]) -> str | None:
    """The standard column that this column may contain."""
    if layout.shape is not None:
        return None
    plain = normalized(name)
    is_system = plain.startswith(("system", "developer", "persona"))
    if layout.row_format == "preference" and "prompt" not in used and not is_system:
        return "prompt"
    if layout.row_format == "messages" and "system" not in used and is_system:
        return "system"
    return None


def _texts(value: object) -> Iterator[str]:
    """The texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in cast("Mapping[str, Any]", value).items():
            if name not in ("role", "from", "type", "id"):
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in cast("list[object]", value):
            yield from _texts(inner)
