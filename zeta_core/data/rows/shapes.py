"""Well-known shapes of rows that differ from the formats of the spec, and their conversion to these formats.

A shape is recognized by its columns, in any case (``Question`` is ``question``). Pairs of a question and an answer
become conversations, because a chat template then separates them; two texts under ``prompt`` and ``completion`` are
joined as they are. The conversion uses every column of the shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from zeta_core.data.rows.row import describe_type

Fields = Mapping[str, object]
ShapeFormat = Literal["messages", "preference"]

_SYSTEM = ("system", "system_prompt", "system_message")
# Alpaca (github.com/tatsu-lab/stanford_alpaca): `input` is context for the instruction. `system` and `history`, a list
# of pairs of a question and an answer, are LLaMA-Factory's additions (its data/README.md).
_PAIRS: tuple[tuple[str, str, str], ...] = (
    ("Alpaca", "instruction", "output"),
    ("instruction and response", "instruction", "response"),
    ("question and answer", "question", "answer"),
    ("question and response", "question", "response"),
    ("query and response", "query", "response"),
    ("query and answer", "query", "answer"),
    ("problem and solution", "problem", "solution"),
    ("prompt and response", "prompt", "response"),
    ("prompt and answer", "prompt", "answer"),
    ("prompt and output", "prompt", "output"),
    ("inputs and targets", "inputs", "targets"),
    ("input and output", "input", "output"),
    ("user and assistant", "user", "assistant"),
)
_PREFERENCE_PROMPTS = ("question", "instruction", "query", "problem", "input", "prompt")


class InvalidShape(Exception):
    """A row whose values do not fit its shape. The message completes a sentence that starts with the row."""


@dataclass(frozen=True)
class Shape:
    """A shape of rows. All column names are normalized. ``context`` is text that follows the prompt."""

    name: str
    row_format: ShapeFormat
    required: tuple[str, ...]
    context: str | None = None
    optional: tuple[str, ...] = ()
    is_nested: bool = False  # the prompt is in an object, as in OpenAI's API

    def used_columns(self, row: Fields) -> dict[str, str]:
        """The columns of a row that the shape uses, as a mapping from normalized names to the names in the data."""
        known = {*self.required, *self.optional, self.context}
        return {normalized(name): name for name in row if normalized(name) in known}

    def fits(self, row: Fields) -> bool:
        columns = self.used_columns(row)
        if not all(name in columns for name in self.required):
            return False
        return not self.is_nested or isinstance(row[columns[self.required[0]]], Mapping)

    def convert(self, row: Fields) -> dict[str, object]:
        """The row in the format `row_format`. Raises `InvalidShape`."""
        values = {name: row[column] for name, column in self.used_columns(row).items()}
        for name in self.required:
            if values.get(name) is None:
                raise InvalidShape(f"has no {name!r}, which {self.name} rows have.")
        if self.row_format == "messages":
            prompt, answer = self.required
            turns = [*self._prompt(values, prompt), _turn("assistant", _text(values, answer))]
            return {"messages": turns}
        if self.is_nested:
            return _openai_preference(values)
        prompt = self.required[0]
        if isinstance(values[prompt], str):
            turns: object = self._prompt(values, prompt)
        elif any(values.get(name) for name in (*_SYSTEM, self.context or "")):
            raise InvalidShape(f"has {prompt!r} as messages and a system text or context beside it; use one of them.")
        else:
            turns = values[prompt]
        return {"prompt": turns, "chosen": _answer(values["chosen"]), "rejected": _answer(values["rejected"])}

    def _prompt(self, values: Mapping[str, object], prompt: str) -> list[dict[str, str]]:
        """The turns up to the answer."""
        turns: list[dict[str, str]] = []
        systems = [name for name in _SYSTEM if values.get(name)]
        if len(systems) > 1:
            raise InvalidShape(f"has several system texts: {', '.join(systems)}; provide one of them.")
        if systems:
            turns.append(_turn("system", _text(values, systems[0])))
        turns += _history(values.get("history"))
        text = _text(values, prompt)
        if self.context is not None and values.get(self.context):
            text += "\n" + _text(values, self.context)  # as LLaMA-Factory joins them
        return [*turns, _turn("user", text)]


def normalized(name: str) -> str:
    """The name of a column in lower case, with underscores for spaces and hyphens."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _shapes() -> list[Shape]:
    pairs = [
        Shape(
            name,
            "messages",
            (prompt, answer),
            context="input" if prompt == "instruction" else None,
            optional=(*_SYSTEM, *(("history",) if prompt == "instruction" else ())),
        )
        for name, prompt, answer in _PAIRS
    ]
    preferences = [
        Shape(
            f"{prompt}, chosen and rejected",
            "preference",
            (prompt, "chosen", "rejected"),
            context="input" if prompt == "instruction" else None,
            optional=(*_SYSTEM, *(("history",) if prompt == "instruction" else ())),
        )
        for prompt in _PREFERENCE_PROMPTS
        if prompt != "prompt"
    ]
    # https://platform.openai.com/docs/guides/direct-preference-optimization
    columns = ("input", "preferred_output", "non_preferred_output")
    openai = Shape("OpenAI preference", "preference", columns, is_nested=True)
    return [openai, *preferences, *pairs]


SHAPES: dict[str, Shape] = {shape.name: shape for shape in _shapes()}
SHAPE_COLUMNS = frozenset(
    name for shape in SHAPES.values() for name in (*shape.required, *shape.optional, shape.context) if name
)


def detect_shape(row: Fields, row_formats: Sequence[str]) -> Shape | None:
    """The shape of a row that can be converted to one of ``row_formats``, tried in order."""
    for row_format in row_formats:
        for shape in SHAPES.values():
            if shape.row_format == row_format and shape.fits(row):
                return shape
    return None


def _openai_preference(values: Mapping[str, object]) -> dict[str, object]:
    request = values["input"]
    if not isinstance(request, Mapping):
        raise InvalidShape("has 'input' that is not an object; use {\"messages\": [...]}.")
    fields = cast("dict[str, Any]", request)
    unknown = sorted(
        name for name, value in fields.items() if value and name not in ("messages", "tools", "parallel_tool_calls")
    )
    if unknown:
        raise InvalidShape(f"has {unknown[0]!r} in 'input', which is not used; remove it.")
    return {
        "prompt": fields.get("messages"),
        "chosen": values["preferred_output"],
        "rejected": values["non_preferred_output"],
        "tools": fields.get("tools"),
    }


def _history(history: object) -> list[dict[str, str]]:
    """Earlier turns: a list of pairs of a question and an answer."""
    if not history:
        return []
    turns: list[dict[str, str]] = []
    for pair in cast("list[object]", history) if isinstance(history, list) else [None]:
        texts = cast("list[object]", pair) if isinstance(pair, list) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise InvalidShape("has 'history' that is not a list of pairs of texts: [[question, answer], ...].")
        question, answer = cast("list[str]", texts)
        turns += [_turn("user", question), _turn("assistant", answer)]
    return turns


def _answer(value: object) -> object:
    """An answer of a preference row as turns, if it is text."""
    if isinstance(value, str):
        if not value.strip():
            raise InvalidShape("has an empty answer in 'chosen' or 'rejected'.")
        return [_turn("assistant", value)]
    return value


def _text(values: Mapping[str, object], name: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise InvalidShape(f"{name!r} is {describe_type(value)}; it must be text.")
    if not value.strip():
        raise InvalidShape(f"{name!r} is empty.")
    return value


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
