"""Finding the tokens that the training data teaches as the end of an answer or a document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from zeta_core.data.tokens.token_file import TokenFile

MAX_DOCUMENTS = 1000  # documents to examine, evenly spaced
MAX_TOKENS = 1 << 16  # last tokens of each document to examine
_LONGEST_END = 8  # tokens from the end token to the end of an answer; templates add at most a few line breaks
_MIN_SHARE = 0.05  # of the answers with an end; rarer tokens are content


@dataclass(frozen=True)
class EndTokens:
    """The end tokens that are trained on, most frequent first, and the share of answers or documents that have one."""

    ids: tuple[int, ...]
    share: float


def find_end_tokens(tokens: TokenFile, tokenizer: Any) -> EndTokens:
    """Examine how the trained parts of the documents end.

    An end is the first special token after the content. For example, ``<|im_end|>`` is the end of
    ``It is 12.<|im_end|>\\n``. The tokenizer's own end token counts anywhere, because pre-tokenized rows may contain
    several documents.
    """
    markers = Markers.of(tokenizer)
    counts: Counter[int] = Counter()
    num_parts = num_ended = 0
    own = tokenizer.eos_token_id
    for ids in _trained_parts(tokens):
        num_parts += 1
        end = markers.first_in_tail(ids, tokenizer)
        if end is None and own is not None and (ids == own).any():
            end = own
        if end is not None:
            counts[end] += 1
            num_ended += 1
    found = tuple(end for end, count in counts.most_common() if count >= _MIN_SHARE * num_ended)
    return EndTokens(found, num_ended / num_parts if num_parts else 0.0)


@dataclass(frozen=True)
class Markers:
    """Tokens of a tokenizer that are not text: special ones, and others that were added."""

    special: frozenset[int]
    added: frozenset[int]

    @staticmethod
    def of(tokenizer: Any) -> Markers:
        added = cast("dict[int, Any]", getattr(tokenizer, "added_tokens_decoder", {}))
        special = {token for token, about in added.items() if about.special} | set(tokenizer.all_special_ids)
        unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}  # GPT-2 has one token for both
        return Markers(frozenset(special - unknown), frozenset(added.keys() - unknown))

    def first_in_tail(self, ids: NDArray[Any], tokenizer: Any) -> int | None:
        """The first special token, or else added token, of the markers and white space at the end of ``ids``."""
        tail: list[int] = []
        for token in reversed([int(token) for token in ids[-_LONGEST_END:]]):
            if token not in self.special and token not in self.added and tokenizer.decode([token]).strip():
                break
            tail.append(token)
        for kind in (self.special, self.added):
            for token in reversed(tail):
                if token in kind:
                    return token
        return None


def _trained_parts(tokens: TokenFile) -> Iterator[NDArray[Any]]:
    """The runs of consecutive tokens that are trained on, from some documents."""
    step = max(1, tokens.num_documents // MAX_DOCUMENTS)
    for document in range(0, tokens.num_documents, step):
        stop = int(tokens.offsets[document + 1])
        at = tokens.where(np.arange(max(int(tokens.offsets[document]), stop - MAX_TOKENS), stop))
        ids = tokens.ids[at]
        if tokens.supervised is None:
            yield ids
            continue
        edges = np.flatnonzero(np.diff(np.pad(tokens.supervised[at].astype(np.int8), 1)))
        for begin, end in edges.reshape(-1, 2):
            yield ids[begin:end]
