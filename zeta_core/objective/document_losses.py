"""The loss on each held-out document, for comparing runs.

Each document is a row of its own, so its loss does not depend on how documents are packed. Documents of similar lengths
are computed together, padded on the right, which does not change the results of a causal model. Models that return a
mean, or whose output depends on later tokens, get one document at a time. A document that is longer than ``seq_len`` is
evaluated in parts, as in training.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from zeta_core.contract.job.comparison import DocumentLosses
from zeta_core.contract.job.status import StopAction
from zeta_core.data.sequences import IGNORED, Sequences
from zeta_core.data.tokens import TokenFile
from zeta_core.data.tokens.held_out import document_hashes
from zeta_core.objective.loss import LossFunction
from zeta_core.parallel.processes import Processes

MAX_DOCUMENTS = 1000  # more are sampled evenly; the noise of a comparison is small enough
# The tokens of a batch with its padding. More would only delay stop requests on a CPU, where short batches are as fast.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}


class DocumentEvaluator:
    def __init__(
        self,
        tokens: TokenFile,
        parts: Sequences,
        loss_function: LossFunction,
        processes: Processes,
        device: torch.device,
        *,
        all_documents: bool = False,
        max_batch_tokens: int | None = None,
    ) -> None:
        """``parts`` are the parts of the held-out documents in ``tokens``, one in each sequence.

        If there are more than `MAX_DOCUMENTS`, so many of them are evaluated, evenly spaced, unless ``all_documents``.
        A batch has at most ``max_batch_tokens``, or one part.
        """
        self._parts, self._loss_function, self._processes, self._device = parts, loss_function, processes, device
        starts, _ = parts.spans(np.arange(len(parts)))
        document_P = np.searchsorted(tokens.offsets, starts, "right") - 1
        documents = np.unique(document_P)
        self._num_held_out = len(documents)
        if len(documents) > MAX_DOCUMENTS and not all_documents:
            documents = documents[np.linspace(0, len(documents) - 1, MAX_DOCUMENTS).round().astype(np.int64)]
        self._documents = documents
        self.measured: list[int] = []  # the numbers of the evaluated documents in ``tokens``, in the order of losses
        self._parts_to_evaluate = np.flatnonzero(np.isin(document_P, documents))
        self._row_of_part = np.searchsorted(documents, document_P[self._parts_to_evaluate])
        self._hashes = [f"{int(number):016x}" for number in document_hashes(tokens)[documents]]
        limit = _BATCH_TOKENS.get(device.type, _BATCH_TOKENS["cpu"])
        self._batches = self._divide(limit if max_batch_tokens is None else min(limit, max_batch_tokens))

    def evaluate(
        self,
        model: nn.Module,
        step: int,
        agreed_stop: Callable[[], StopAction | None],
        on_documents: Callable[[int], None] | None = None,
    ) -> DocumentLosses | StopAction:
        """The losses, or the stop action if a stop was requested. Every rank calls the model equally often.

        ``on_documents`` is called with the number of complete documents after each batch.
        """
        processes, device = self._processes, self._device
        sums_D = torch.zeros(len(self._hashes), dtype=torch.float64, device=device)
        targets_D = torch.zeros_like(sums_D)
        parts_left_D = np.bincount(self._row_of_part, minlength=len(self._hashes))
        for start in range(0, len(self._batches), processes.world_size):
            if (stop := agreed_stop()) is not None:
                return stop
            own = start + processes.rank
            counts = own < len(self._batches)
            # A rank without a batch repeats one that does not count, so that all ranks call the model.
            numbers_B = self._batches[own if counts else start]
            batch = self._parts.batch(
                self._parts_to_evaluate[numbers_B],
                len(numbers_B) if counts else 0,
                isolate=self._loss_function.isolates,
            ).to(device)
            if not batch.num_targets and processes.world_size == 1:
                continue
            rows_B = torch.from_numpy(self._row_of_part[numbers_B]).to(device)
            sums_D.index_add_(0, rows_B, self._loss_function.row_losses(model, batch).double())
            targets_D.index_add_(0, rows_B, (batch.labels_BT[:, 1:] != IGNORED).sum(1).double())
            if on_documents is not None:
                np.subtract.at(parts_left_D, self._row_of_part[numbers_B], 1)
                on_documents(int((parts_left_D == 0).sum()))
        losses, targets = processes.sum(sums_D), processes.sum(targets_D)
        self.measured = [int(document) for document, count in zip(self._documents, targets, strict=True) if count]
        return DocumentLosses(
            step=step,
            num_held_out=self._num_held_out,
            documents=[text for text, count in zip(self._hashes, targets, strict=True) if count],
            num_targets=[int(count) for count in targets if count],
            losses=[loss for loss, count in zip(losses, targets, strict=True) if count],
        )

    def _divide(self, max_tokens: int) -> list[NDArray[np.int64]]:
        """The parts to evaluate in batches, by their numbers: the shortest first, so that they need little padding."""
        starts, ends = self._parts.spans(self._parts_to_evaluate)
        lengths = ends - starts
        order = np.argsort(lengths, kind="stable")
        if not self._loss_function.separates_rows:
            return [order[number : number + 1] for number in range(len(order))]
        firsts = [0]
        for number, length in enumerate(lengths[order].tolist()):
            if number > firsts[-1] and (number - firsts[-1] + 1) * length > max_tokens:
                firsts.append(number)
        return np.split(order, firsts[1:]) if len(order) else []
