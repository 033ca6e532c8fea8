"""Comparing two trained models by their losses on the same held-out documents, with the noise of that comparison."""

from __future__ import annotations

import math
import random
from typing import Literal

from pydantic import BaseModel, ConfigDict

from zeta_core.contract.errors import InvalidRequest

DOCUMENT_LOSSES_FILE = "document_losses.json"  # in the training state of a checkpoint; a `DocumentLosses`
MAX_DOCUMENT_LOSSES_BYTES = 1 << 20  # of that file, which has at most 1000 documents
MIN_DOCUMENTS = 5  # with fewer documents, resampling is not informative
NUM_RESAMPLES = 2000
MAX_GROUPS = 1000  # more documents are resampled in groups, because the time grows with their number
CONFIDENCE = 0.95


class DocumentLosses(BaseModel):
    """The losses of a model on held-out documents; lists have one entry per document.

    ``documents`` are hashes of the token ids. ``losses`` are sums over ``num_targets`` tokens in nats.
    ``num_held_out`` documents are held out in all; if there are too many, these are evenly spaced among them.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    step: int
    num_held_out: int
    documents: list[str]
    num_targets: list[int]
    losses: list[float]

    @property
    def mean_loss(self) -> float:
        """The mean per target token."""
        return math.fsum(self.losses) / sum(self.num_targets)


class Comparison(BaseModel):
    """The difference of the mean losses of two models, A minus B, in nats per token.

    ``low`` and ``high`` limit the differences that are plausible with other documents of the same kind: the 95 %
    interval of a paired bootstrap. ``better`` is null if the interval contains 0: the models are not distinguishable.
    """

    model_config = ConfigDict(frozen=True)

    loss_a: float
    loss_b: float
    difference: float
    low: float
    high: float
    num_documents: int
    better: Literal["a", "b"] | None


def compare(a: DocumentLosses, b: DocumentLosses) -> Comparison:
    """Compare two models. Raises `InvalidRequest` if they were not evaluated on the same tokens of enough documents.

    The bootstrap resamples documents with replacement and takes both models' losses on the same documents (Efron and
    Tibshirani, An Introduction to the Bootstrap, chapter 13). It is repeatable: its seed is fixed.
    """
    _require_comparable(a, b)
    differences = [loss_a - loss_b for loss_a, loss_b in zip(a.losses, b.losses, strict=True)]
    pairs = _grouped(differences, a.num_targets)
    draw = random.Random(0)
    resampled: list[float] = []
    for _ in range(NUM_RESAMPLES):
        chosen = draw.choices(pairs, k=len(pairs))
        resampled.append(sum(pair[0] for pair in chosen) / sum(pair[1] for pair in chosen))
    resampled.sort()
    cut = round(NUM_RESAMPLES * (1 - CONFIDENCE) / 2)
    low, high = resampled[cut], resampled[-1 - cut]
    return Comparison(
        loss_a=a.mean_loss,
        loss_b=b.mean_loss,
        difference=math.fsum(differences) / sum(a.num_targets),
        low=low,
        high=high,
        num_documents=len(differences),
        better="a" if high < 0 else "b" if low > 0 else None,
    )


def _grouped(differences: list[float], num_targets: list[int]) -> list[tuple[float, int]]:
    """The sums of the differences and of the targets over each of at most `MAX_GROUPS` groups of documents."""
    num_groups = min(len(differences), MAX_GROUPS)
    return [
        (math.fsum(differences[start::num_groups]), sum(num_targets[start::num_groups])) for start in range(num_groups)
    ]


def _require_comparable(a: DocumentLosses, b: DocumentLosses) -> None:
    if a.documents != b.documents:
        num_shared = len(set(a.documents) & set(b.documents))
        raise InvalidRequest(
            f"The jobs have different held-out documents ({len(a.documents)} and {len(b.documents)}, {num_shared} of "
            "them the same), so their losses can't be compared; give both the same eval_dataset and tokenizer, or the "
            "same dataset, eval_split and seed.",
            code="other_held_out_data",
        )
    if a.num_targets != b.num_targets:
        raise InvalidRequest(
            "The jobs are evaluated on different tokens of the same held-out documents; give both the same seq_len, "
            "train_on and overlong.",
            code="other_held_out_data",
        )
    if len(a.documents) < MIN_DOCUMENTS:
        raise InvalidRequest(
            f"Only {len(a.documents)} documents are held out, which is too few to tell a difference from noise; hold "
            f"out at least {MIN_DOCUMENTS} (a larger eval_split, or an eval_dataset).",
            code="too_few_documents",
        )
