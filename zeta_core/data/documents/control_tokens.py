"""Control tokens in the text of the data: finding them, and encoding them as ordinary text.

A control token such as ``<|im_end|>`` has a meaning for the model. In the text of a user it is only text, so it must
not become the token. Text that a chat template renders is therefore marked first: each control token in the data gets
a mark before and after it. The marks are noncharacters, which Unicode reserves for internal use. They are removed from
the rendered text, and what is between them is encoded as if the tokenizer had no added tokens.

Control tokens are the special tokens of a tokenizer. In the turns of a user or a tool, they are also the other added
tokens that the chat template writes, such as Qwen's ``<tool_call>``. In the turns of the assistant these are part of
what the model has to generate, unless they mark the bounds of turns.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

OPEN, CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"[{OPEN}{CLOSE}]")
_MARKED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}")

Range = tuple[int, int]


class NotText(Exception):
    """A control token that the tokenizer cannot encode as text."""


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """The texts of the tokens that the tokenizer calls special."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(added | {str(token) for token in tokenizer.all_special_tokens})


def other_added_tokens(tokenizer: Any) -> frozenset[str]:
    """The texts of the other added tokens. White space is ordinary text even if it is an added token."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if not token.special}
    return frozenset(token for token in added if not token.isspace())


def compile_pattern(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that matches any of the tokens, the longest one first."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def find(text: str, pattern: re.Pattern[str] | None) -> tuple[Range, ...]:
    """The ranges of the control tokens in a text."""
    return () if pattern is None else tuple(match.span() for match in pattern.finditer(text))


def mark(value: Any, pattern: re.Pattern[str] | None) -> tuple[Any, int]:
    """A copy of ``value`` with all control tokens in its strings marked, and their number."""
    if isinstance(value, str):
        return (value, 0) if pattern is None else pattern.subn(f"{OPEN}\\g<0>{CLOSE}", value)
    if isinstance(value, Mapping):
        marked = {name: mark(inner, pattern) for name, inner in cast("Mapping[Any, Any]", value).items()}
        return {name: inner for name, (inner, _) in marked.items()}, sum(count for _, count in marked.values())
    if isinstance(value, list | tuple):
        several = [mark(inner, pattern) for inner in cast("list[Any]", value)]
        return [inner for inner, _ in several], sum(count for _, count in several)
    return value, 0


def has_marks(value: Any) -> bool:
    """Whether a string in ``value`` contains the characters that are used as marks."""
    if isinstance(value, str):
        return _MARK.search(value) is not None
    if isinstance(value, Mapping):
        return any(map(has_marks, cast("Mapping[Any, Any]", value).values()))
    return isinstance(value, list | tuple) and any(map(has_marks, cast("list[Any]", value)))


def without_marks(text: str) -> str:
    return _MARK.sub("", text)


@dataclass(frozen=True)
class Unmarked:
    """A text without its marks, the ranges that were between marks, and the mapping of positions."""

    text: str
    literals: tuple[Range, ...]
    marks: tuple[int, ...]

    def position(self, marked: int) -> int:
        """The position in `text` of a position in the marked text."""
        return marked - bisect_left(self.marks, marked)


def unmark(text: str) -> Unmarked:
    unmarked = Unmarked(without_marks(text), (), tuple(match.start() for match in _MARK.finditer(text)))
    ranges = tuple((unmarked.position(m.start(1)), unmarked.position(m.end(1))) for m in _MARKED.finditer(text))
    return Unmarked(unmarked.text, ranges, unmarked.marks)


class PlainTextEncoder:
    """Encodes texts in which some ranges are ordinary text even if they look like control tokens."""

    def __init__(self, tokenizer: Any, encode: Callable[[list[str]], list[NDArray[Any]]]) -> None:
        """``encode`` encodes texts with all of the tokenizer's tokens."""
        self._tokenizer = tokenizer
        self._encode = encode
        self._known: dict[str, NDArray[Any]] = {}

    def encode(self, text: str, literals: tuple[Range, ...]) -> NDArray[Any]:
        """The ids of a text whose ``literals`` are encoded as text. Raises `NotText`."""
        ids: list[NDArray[Any]] = []
        at = 0
        for start, end in (*literals, (len(text), len(text))):
            if start > at:
                [piece] = self._encode([text[at:start]]) if at == 0 else [self._continued(text[at:start])]
                ids.append(piece)
            if end > start:
                ids.append(self._literal(text[start:end]))
            at = end
        return np.concatenate(ids) if ids else self._encode([""])[0]

    def _continued(self, piece: str) -> NDArray[Any]:
        """Encode a piece that does not begin a text, so it gets no space that the tokenizer puts before a text.

        It is encoded after a line break, whose ids are removed, as transformers does for the same purpose
        (`encode_marked_chat`).
        """
        longer, alone = self._encode(["\n" + piece, piece])
        begin = self._line_break
        return longer[len(begin) :] if np.array_equal(longer[: len(begin)], begin) else alone

    @cached_property
    def _line_break(self) -> NDArray[Any]:
        return self._encode(["\n"])[0]

    def _literal(self, token: str) -> NDArray[Any]:
        if token not in self._known:
            self._known[token] = self._encoded_literal(token)
        return self._known[token]

    def _encoded_literal(self, token: str) -> NDArray[Any]:
        control = self._tokenizer.convert_tokens_to_ids(token)
        ids = self._without_added_tokens(token)
        if control in ids and len(token) > 1:  # a unigram model has its control tokens as ordinary pieces, too
            ids = [*self._without_added_tokens(token[0]), *self._without_added_tokens(token[1:])]
        if control in ids:
            raise NotText(token)
        return np.asarray(ids, dtype=self._line_break.dtype)

    def _without_added_tokens(self, text: str) -> list[int]:
        begin, longer = self._split("\n"), self._split("\n" + text)
        return longer[len(begin) :] if longer[: len(begin)] == begin else self._split(text)

    def _split(self, text: str) -> list[int]:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        # `split_special_tokens` only applies to the special ones of the added tokens, so run the parts of the backend.
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        pieces = (
            [text] if backend.pre_tokenizer is None else [p for p, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        )
        return [token.id for piece in pieces for token in backend.model.tokenize(piece)]
