"""Answers with their prompts as sequences: pairs of two answers, and single answers with a label.

Each answer has its own row, with its prompt. Targets are counted in samples (pairs or labeled answers), because the
mean loss over the samples is minimized, regardless of the answers' lengths.

Shapes: S samples, R rows (the answers of a batch; for pairs, R = 2 S, the chosen ones first), T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from zeta_core.data.sequences import MicroBatch, Overlong, Sequences
from zeta_core.data.sequences.batch import make_batch
from zeta_core.data.tokens import TokenFile
from zeta_core.failures import InvalidData


@dataclass(frozen=True)
class AnswerBatch(MicroBatch):
    """Answers with their prompts, one per row. ``num_targets`` is the number of samples that count."""

    reference_R: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # log-probabilities of the reference
    counts_S: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # 1, or 0 for a filler sample
    desirable_S: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # 1 or 0; empty for pairs
    divergence: float = 0.0  # see `LabeledAnswers`

    def to(self, device: torch.device) -> AnswerBatch:
        values = dict[str, Any](vars(super().to(device)))
        for name in ("reference_R", "counts_S", "desirable_S"):
            values[name] = getattr(self, name).to(device)
        values["divergence"] = self.divergence
        return AnswerBatch(**values)


class Referenced(Protocol):
    """Rows with the reference model's log-probabilities (`reference_R`, in the same order)."""

    reference_R: NDArray[np.float32]

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of these samples, in the order of a batch."""
        ...

    def batch(self, indices: NDArray[np.int64], num_counting: int, *, isolate: bool = True) -> MicroBatch: ...

    def __len__(self) -> int: ...


class AnswerSequences(Sequences):
    """The common part of `Pairs` and `LabeledAnswers`."""

    reference_R: NDArray[np.float32]

    @property
    def referenced(self) -> Mapping[str, Referenced]:
        """The rows for which the reference model computes log-probabilities, by the suffix of their stored name."""
        return {"": self}

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return indices

    def num_targets(self, indices: NDArray[np.int64]) -> int:
        """The number of samples."""
        return len(indices)

    def batch(self, indices: NDArray[np.int64], num_counting: int, *, isolate: bool = True) -> AnswerBatch:
        rows_R = self.rows(indices)
        values = dict[str, Any](vars(super().batch(rows_R, len(rows_R), isolate=isolate)))
        values |= {
            "num_targets": num_counting,
            "reference_R": torch.from_numpy(self.reference_R[rows_R]),
            "counts_S": torch.from_numpy((np.arange(len(indices)) < num_counting).astype(np.float32)),
        }
        return AnswerBatch(**values)


class Pairs(AnswerSequences):
    """Pairs of a chosen and a rejected answer, by index."""

    def __init__(self, tokens: TokenFile, seq_len: int, *, overlong: Overlong | None) -> None:
        if not tokens.has_pairs:
            raise InvalidData("the method needs rows with prompt, chosen and rejected; the data has none.")
        super().__init__(tokens, seq_len, pack=False, overlong=overlong, group_size=2)
        self.reference_R = np.zeros(2 * len(self), dtype=np.float32)  # per pair: chosen, rejected

    def __len__(self) -> int:
        return super().__len__() // 2

    @property
    def longest(self) -> int:
        """Twice the number of tokens of the longest answer with its prompt, because a pair has two rows."""
        return 2 * super().longest

    @property
    def source_bounds(self) -> NDArray[np.int64]:
        return super().source_bounds // 2

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """All chosen answers, then all rejected ones."""
        return np.concatenate((2 * indices, 2 * indices + 1))

    def num_tokens(self, indices: NDArray[np.int64]) -> int:
        return super().num_tokens(self.rows(indices))

    def widths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Twice the length of the longer answer, because a pair has two rows of equal width."""
        return 2 * super().widths(self.rows(indices)).reshape(2, -1).max(0)

    def num_target_tokens(self, indices: NDArray[np.int64]) -> int:
        return super().num_target_tokens(self.rows(indices))


class LabeledAnswers(AnswerSequences):
    """Answers that are desirable or not, by index.

    ``divergence`` is the estimated divergence of the model from the reference, for the samples of the next batches.
    """

    def __init__(self, tokens: TokenFile, seq_len: int, *, overlong: Overlong | None) -> None:
        if tokens.labels is None:
            raise InvalidData("method 'kto' needs rows with prompt, completion and label; the data has none.")
        super().__init__(tokens, seq_len, pack=False, overlong=overlong)
        if len(self) == 1:
            raise InvalidData(
                "method 'kto' needs at least two answers, because it also computes the probability of each answer "
                "after another prompt; the data has one."
            )
        starts, _ = self.spans(np.arange(len(self)))
        self._desirable = np.asarray(tokens.labels)[np.searchsorted(tokens.offsets, starts, "right") - 1]
        self.reference_R = np.zeros(len(self), dtype=np.float32)
        self.mismatched = MismatchedAnswers(self, tokens)
        self.divergence = 0.0

    @property
    def referenced(self) -> Mapping[str, Referenced]:
        return {"": self, "_mismatched": self.mismatched}

    def batch(self, indices: NDArray[np.int64], num_counting: int, *, isolate: bool = True) -> AnswerBatch:
        batch = super().batch(indices, num_counting, isolate=isolate)
        desirable_S = torch.from_numpy(self._desirable[indices].astype(np.float32))
        return replace(batch, desirable_S=desirable_S, divergence=self.divergence)


class MismatchedAnswers:
    """Each prompt of `LabeledAnswers` with the answer of another row, half of the data further on.

    The other answer is always the same, so the reference model's log-probability can be stored. Rows about the same
    prompt are usually neighbors, so it is rarely an answer to the same prompt. It is cut where it exceeds ``seq_len``.
    """

    def __init__(self, answers: LabeledAnswers, tokens: TokenFile) -> None:
        self._answers, self._tokens = answers, tokens
        self.reference_R = np.zeros(len(answers), dtype=np.float32)

    def __len__(self) -> int:
        return len(self._answers)

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return indices

    def batch(self, indices: NDArray[np.int64], num_counting: int, *, isolate: bool = True) -> MicroBatch:
        others = (indices + len(self) // 2) % len(self)
        rows: list[NDArray[np.int64]] = []
        for index, other in zip(indices, others, strict=True):
            prompt, answer = self._divided(int(index))[0], self._divided(int(other))[1]
            rows.append(np.concatenate((prompt, answer))[: self._answers.seq_len])
        length = max(map(len, rows))
        at_BT = np.stack([np.pad(row, (0, length - len(row)), mode="edge") for row in rows])
        inside_BT = np.arange(length) < np.array([len(row) for row in rows])[:, None]
        return make_batch(self._tokens, at_BT, np.where(inside_BT, 0, -1), num_counting, isolate=isolate)

    def _divided(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The positions of a prompt, and those of its answer, which begins with the first token that is trained on."""
        start, end = (int(at[0]) for at in self._answers.spans(np.array([index])))
        at = np.arange(start, end)
        assert self._tokens.supervised is not None, "the prompts are not trained on"
        first = int(np.argmax(self._tokens.supervised[self._tokens.where(at)]))
        return at[:first], at[first:]


def preference_sequences(tokens: TokenFile, seq_len: int, method: str, *, overlong: Overlong | None) -> AnswerSequences:
    """The sequences that ``method`` learns from. Raises `InvalidData` if the data has another format."""
    kind = LabeledAnswers if method == "kto" else Pairs
    return kind(tokens, seq_len, overlong=overlong)
