"""Encoding rows as token ids and, for conversations and pairs, marking the tokens that are trained on.

An `Encoder` is independent of files and processes: it converts the rows of one unit to arrays, so it can run in this
process or in a forked one. Shapes: N tokens, D documents or pieces of documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from zeta_core.data.documents import control_tokens
from zeta_core.data.documents.control_tokens import NotText, PlainTextEncoder
from zeta_core.data.documents.conversations import Text, TrainOn
from zeta_core.data.documents.rendering import Renderer
from zeta_core.data.documents.template import Unlearnable
from zeta_core.data.rows.formats import read_label
from zeta_core.data.rows.row import Row, at_location
from zeta_core.data.rows.token_rows import InvalidTokenRow, MaskPresence, TokenRow, read_token_row
from zeta_core.data.rows.turns import InvalidTurn
from zeta_core.data.sandbox import Position
from zeta_core.data.sources import Source
from zeta_core.failures import InvalidData


@dataclass(frozen=True)
class Encoded:
    """Consecutive documents. ``ends_D`` is false for a piece that continues in the next one."""

    ids_N: NDArray[Any]
    lengths_D: NDArray[np.int64]
    ends_D: NDArray[np.bool_]
    rows_D: NDArray[np.int64]  # the source row or line of each document, 0 for a text file
    hashes_D: NDArray[np.uint64]  # hashes of the ids, for finding exact duplicates
    groups_D: NDArray[np.uint64]  # hashes of the values of ``group_by``; zeros without it
    labels_D: NDArray[np.bool_] | None = None  # whether each answer is desirable; None: answers have no labels
    supervised_N: NDArray[np.bool_] | None = None  # the tokens that are trained on; None means all
    num_split: int = 0  # conversations that were split into several documents
    num_untrained: int = 0  # rows that are omitted because none of their tokens is trained on
    num_padding: int = 0  # padding tokens that were removed
    rows_with: Mapping[str, int] = field(default_factory=dict[str, int])  # per mask, the first row that has it
    rows_without: Mapping[str, int] = field(default_factory=dict[str, int])  # per mask, the first row that lacks it
    templated: bool = False  # a chat template was used
    added_beginning: str = ""  # the text that was prepended to the template, so that conversations begin as texts do
    blank: bool = False  # all texts are empty or white space
    num_control_tokens: int = 0  # control tokens in the texts of the data
    first_control_token: str = ""  # the location of the first one
    unused_columns: Sequence[str] = ()  # columns of the data that are not used
    mapped_columns: Sequence[str] = ()  # columns of the data that are used because the source's ``columns`` name them
    num_with_unused_turns: int = 0  # conversations with turns after the last one that is trained on

    def supervised_mask(self, *, continues_document: bool) -> NDArray[np.bool_]:
        """The tokens that are trained on, (N,): `supervised_N`, or all but the first token of each document.

        ``continues_document``: the first piece continues the last document of the unit before.
        """
        if self.supervised_N is not None:
            return self.supervised_N
        mask_N = np.ones(len(self.ids_N), dtype=np.bool_)
        starts = (np.cumsum(self.lengths_D) - self.lengths_D)[self.lengths_D > 0]
        mask_N[starts[1:] if continues_document else starts] = False
        return mask_N


class Encoder:
    """Tokenizes the data of one run. ``dtype`` is the type of the ids; ``train_on=None`` is the format's default.

    ``today`` is the date that chat templates render.
    """

    def __init__(
        self,
        tokenizer: Any,
        dtype: np.dtype[Any],
        *,
        train_on: TrainOn | None,
        today: date | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.dtype = dtype
        self._plain_text = PlainTextEncoder(tokenizer, self._tokenize)
        self._train_on: TrainOn | None = train_on
        end = tokenizer.eos_token_id
        self._begin = np.array(_beginning(tokenizer), dtype=dtype)
        self._end = np.array([] if end is None else [end], dtype=dtype)
        self._special = control_tokens.compile_pattern(control_tokens.special_tokens(tokenizer))
        self._renderer = Renderer(
            tokenizer,
            train_on=train_on,
            today=today or datetime.now(UTC).date(),
            beginning=self._begin.tolist(),
            special=self._special,
        )

    def encode(self, source: Source, rows: Iterable[Row], position: Position) -> Encoded:
        """Encode rows as documents. Raises `InvalidData` naming a row that cannot be trained on.

        ``position`` is updated as the rows are processed.
        """
        unused: dict[str, None] = {}
        mapped: dict[str, None] = {}

        def checked() -> Iterable[Row]:
            for row in rows:
                unused.update(dict.fromkeys(source.unused_columns(row)))
                mapped.update(dict.fromkeys(source.mapped_columns(row)))
                yield replace(row, group=source.group(row))

        encoded = self._encoded(source, checked(), position)
        return replace(encoded, unused_columns=tuple(unused), mapped_columns=tuple(mapped))

    def _encoded(self, source: Source, rows: Iterable[Row], position: Position) -> Encoded:
        if source.row_format not in ("tokens", "text"):
            return self._conversations(source, rows, position)
        read = list(rows)
        if read:
            position.move(source.location(read[0].number), "tokenizing")
        return self._ids(source, read) if source.row_format == "tokens" else self._texts(source, read)

    # --- text and ids ---

    def _ids(self, source: Source, rows: list[Row]) -> Encoded:
        token_rows: list[TokenRow] = []
        columns = MaskPresence()
        for row in rows:
            source.fields(row)  # checks the ids
            try:
                token_rows.append(read_token_row(row.fields, source.columns, self._train_on, self.dtype))
            except InvalidTokenRow as error:
                raise InvalidData(at_location(source.location(row.number), str(error))) from error
            columns.add(row.number, row.fields, source.columns)
        trained = [(token_row, row) for token_row, row in zip(token_rows, rows, strict=True) if token_row.is_trained_on]
        supervised_N = None
        if any(token_row.trained_N is not None for token_row, _ in trained):
            supervised_N = np.concatenate([token_row.supervised_N for token_row, _ in trained])
        return replace(
            self._documents([token_row.ids_N for token_row, _ in trained], [row for _, row in trained], supervised_N),
            num_untrained=len(token_rows) - len(trained),
            num_padding=sum(token_row.num_padding for token_row in token_rows),
            rows_with=columns.rows_with,
            rows_without=columns.rows_without,
        )

    def _texts(self, source: Source, rows: list[Row]) -> Encoded:
        if self._train_on not in (None, "all"):
            raise InvalidData(
                f"train_on is {self._train_on!r}, but {source.name} is plain text without turns; use 'all', or provide "
                "conversations or pairs of prompt and completion."
            )
        texts = [cast(str, source.fields(row)["text"]) for row in rows]
        control_ranges = [control_tokens.find(text, self._special) for text in texts]
        first = next((source.location(row.number) for row, some in zip(rows, control_ranges, strict=True) if some), "")
        literals = [()] * len(control_ranges) if source.allow_control_tokens else control_ranges
        try:
            bodies = self._bytes(texts) if self._is_bytes_only(source) else self._encode(texts, literals)
        except NotText as error:
            raise _not_text_error(first, error) from error
        arrays = [
            self._framed(ids, begins=row.begins_document, ends=row.ends_document) if len(ids) else ids
            for row, ids in zip(rows, bodies, strict=True)
        ]
        return replace(
            self._documents(arrays, rows),
            blank=not any(map(str.strip, texts)),
            num_control_tokens=sum(map(len, control_ranges)),
            first_control_token=first,
        )

    def _framed(self, ids: NDArray[Any], *, begins: bool = True, ends: bool = True) -> NDArray[Any]:
        """A text between the tokenizer's begin and end tokens, unless it contains them already."""
        none = self._end[:0]
        has_begin = np.array_equal(ids[: len(self._begin)], self._begin)
        has_end = np.array_equal(ids[len(ids) - len(self._end) :], self._end)
        begin = self._begin if begins and not has_begin else none
        return np.concatenate((begin, ids, self._end if ends and not has_end else none))

    def _is_bytes_only(self, source: Source) -> bool:
        return is_bytes(self._tokenizer) and not source.allow_control_tokens

    def _bytes(self, texts: list[str]) -> list[NDArray[Any]]:
        # ByT5's ids are the bytes plus three special ids (Xue et al. 2021, arXiv 2105.13626, section 3.1).
        three = self.dtype.type(3)
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(self.dtype) + three for text in texts]

    def _encode(self, texts: Sequence[str], literals: Sequence[Sequence[tuple[int, int]]]) -> list[NDArray[Any]]:
        """The ids of texts; the ``literals`` of each one are encoded as text, even if they look like control tokens."""
        usual = iter(self._tokenize([text for text, ranges in zip(texts, literals, strict=True) if not ranges]))
        return [
            self._plain_text.encode(text, tuple(ranges)) if ranges else next(usual)
            for text, ranges in zip(texts, literals, strict=True)
        ]

    def _tokenize(self, texts: list[str]) -> list[NDArray[Any]]:
        if not texts:
            return []
        rows = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.asarray(row, dtype=self.dtype) for row in rows["input_ids"]]

    def _documents(
        self, arrays: list[NDArray[Any]], rows: Sequence[Row], supervised_N: NDArray[np.bool_] | None = None
    ) -> Encoded:
        template = self._renderer.used_template
        return Encoded(
            ids_N=np.concatenate(arrays) if arrays else np.empty(0, self.dtype),
            lengths_D=np.array([len(array) for array in arrays], dtype=np.int64),
            ends_D=np.array([row.ends_document for row in rows], dtype=np.bool_),
            rows_D=np.array([row.number for row in rows], dtype=np.int64),
            hashes_D=np.array([content_hash(array) for array in arrays], dtype=np.uint64),
            groups_D=np.array([row.group for row in rows], dtype=np.uint64),
            supervised_N=supervised_N,
            templated=template is not None,
            added_beginning="" if template is None else template.added_beginning,
        )

    # --- conversations ---

    def _conversations(self, source: Source, rows: Iterable[Row], position: Position) -> Encoded:
        texts: list[Text] = []
        owners: list[Row] = []
        labels: list[bool] = []
        num_split = num_control_tokens = num_with_unused_turns = 0
        first_control_token = ""
        for row in rows:
            position.move(source.location(row.number), "rendering")
            fields = source.fields(row)
            try:
                rendered = self._renderer.render(source, fields)
            except (Unlearnable, InvalidTurn) as error:
                raise InvalidData(at_location(source.location(row.number), str(error))) from error
            row_texts = [text for document in rendered for text in document.texts]
            num_split += source.row_format != "preference" and len(row_texts) > 1
            num_with_unused_turns += any(document.has_unused_turns for document in rendered)
            count = sum(document.num_control_tokens for document in rendered)
            first_control_token = first_control_token or (source.location(row.number) if count else "")
            num_control_tokens += count
            texts += row_texts
            owners += [row] * len(row_texts)
            labels += [read_label(fields.get("label")) is True] * len(row_texts)
        if owners:
            position.move(source.location(owners[0].number), "tokenizing")
        arrays: list[NDArray[Any]] = []
        masks: list[NDArray[np.bool_]] = []
        try:
            tokenized = list(self._tokenize_with_masks(texts))
        except NotText as error:
            raise _not_text_error(first_control_token, error) from error
        for row, (ids, trained) in zip(owners, tokenized, strict=True):
            if not trained[1:].any():  # the first token has no context to be predicted from
                raise InvalidData(
                    f"{source.location(row.number)} has no answer tokens to train on; remove the row, or add an answer."
                )
            trained[0] = False
            arrays.append(ids)
            masks.append(trained)
        supervised_N = np.concatenate(masks) if masks else np.empty(0, np.bool_)
        return replace(
            self._documents(arrays, owners, supervised_N),
            labels_D=np.array(labels, np.bool_) if source.row_format == "unpaired_preference" else None,
            num_split=num_split,
            num_control_tokens=num_control_tokens,
            first_control_token=first_control_token,
            num_with_unused_turns=num_with_unused_turns,
        )

    def _tokenize_with_masks(self, texts: list[Text]) -> Iterable[tuple[NDArray[Any], NDArray[np.bool_]]]:
        """Yield the ids of each text, and a mask of the ids that are trained on.

        A text is tokenized as a whole, as in inference. Tokenizing its spans separately usually gives the same ids, and
        their lengths then give the token positions of the span bounds. Otherwise, the text before each bound is
        tokenized separately. A token that crosses the end of a prompt belongs to the prompt.
        """
        bounds = [sorted({0, len(text.text), *(at for span in text.spans for at in span)}) for text in texts]
        pieces = [_slice(text, a, b) for text, at in zip(texts, bounds, strict=True) for a, b in pairwise(at)]
        whole = self._encode([text.text for text in texts], [text.literals for text in texts])
        parts = iter(self._encode([piece for piece, _ in pieces], [literals for _, literals in pieces]))
        for text, ids, at in zip(texts, whole, bounds, strict=True):
            own = [next(parts) for _ in at[1:]]
            if np.array_equal(np.concatenate(own), ids):
                token_at = dict(zip(at, np.cumsum([0, *map(len, own)]), strict=True))
            else:
                token_at = {0: 0, len(text.text): len(ids)}
                between = [bound for bound in at if bound not in token_at]
                beginnings = [_slice(text, 0, bound) for bound in between]
                heads = self._encode([head for head, _ in beginnings], [literals for _, literals in beginnings])
                token_at |= {bound: _prefix_length(head, ids) for bound, head in zip(between, heads, strict=True)}
                starts = {start for start, _ in text.spans} & set(between)
                for bound, head in zip(between, heads, strict=True):
                    if bound in starts and token_at[bound] < len(head):
                        token_at[bound] = min(token_at[bound] + 1, len(ids))
            trained = np.zeros(len(ids), dtype=np.bool_)
            for start, stop in text.spans:
                trained[token_at[start] : token_at[stop]] = True
            if text.plain:
                framed = self._framed(ids)
                at_begin = 0 if np.array_equal(framed[: len(ids)], ids) else len(self._begin)
                trained = np.pad(trained, (at_begin, 0))
                trained = np.pad(trained, (0, len(framed) - len(trained)), constant_values=True)
                ids = framed
            yield ids, trained


def _slice(text: Text, start: int, end: int) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A part of a text, and its literals."""
    literals = ((max(a, start) - start, min(b, end) - start) for a, b in text.literals)
    return text.text[start:end], tuple((a, b) for a, b in literals if a < b)


def _not_text_error(location: str, error: NotText) -> InvalidData:
    return InvalidData(
        f"{location} contains {str(error)!r}, which this tokenizer cannot encode as text; remove it, or set "
        '"allow_control_tokens": true in the source.'
    )


def _beginning(tokenizer: Any) -> list[int]:
    """The tokens that this tokenizer prepends to a text. Llama, Gemma and Mistral have one, GPT-2 has none."""
    if is_bytes(tokenizer):
        return []
    marked, plain = (tokenizer("a", add_special_tokens=marks)["input_ids"] for marks in (True, False))
    at = next((at for at in range(len(marked)) if marked[at : at + len(plain)] == plain), 0)
    return list(marked[:at])


def _prefix_length(first: NDArray[Any], second: NDArray[Any]) -> int:
    """The length of the common prefix of two lists of tokens."""
    count = min(len(first), len(second))
    different = np.flatnonzero(first[:count] != second[:count])
    return int(different[0]) if len(different) else count


def is_bytes(tokenizer: Any) -> bool:
    """Whether this is the byte-level tokenizer, which needs no files."""
    return type(tokenizer).__name__ == "ByT5Tokenizer"


def content_hash(ids: NDArray[Any]) -> int:
    """A 64-bit hash of ids, whatever their type. A collision among a million documents has a probability of 2.7e-8."""
    return bytes_hash(ids.astype("<u4", copy=False).tobytes())


def bytes_hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
