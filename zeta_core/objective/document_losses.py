"""The loss on each held-out document, for comparing runs.

Documents are evaluated one at a time, so a loss does not depend on how documents are packed, and every kind of model
can be evaluated, even one that only returns a mean. A document that is longer than ``seq_len`` is evaluated in parts,
as in training.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from zeta_core.contract.job.comparison import DocumentLosses
from zeta_core.contract.job.status import StopAction
from zeta_core.data.sequences import Sequences
from zeta_core.data.tokens import TokenFile
from zeta_core.data.tokens.held_out import document_hashes
from zeta_core.objective.loss import LossFunction
from zeta_core.parallel.processes import Processes

MAX_DOCUMENTS = 1000  # more are sampled evenly; the noise of a comparison is small enough
_STOP_CHECK_INTERVAL = 16  # calls of the model between checks for a stop request


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
    ) -> None:
        """``parts`` are the parts of the held-out documents in ``tokens``, one in each sequence.

        If there are more than `MAX_DOCUMENTS`, so many of them are evaluated, evenly spaced, unless ``all_documents``.
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

    def evaluate(
        self,
        model: nn.Module,
        step: int,
        agreed_stop: Callable[[], StopAction | None],
        on_document: Callable[[int], None] | None = None,
    ) -> DocumentLosses | StopAction:
        """The losses, or the stop action if a stop was requested. Every rank calls the model equally often.

        ``on_document`` is called with the number of documents before each one that begins.
        """
        processes, device = self._processes, self._device
        sums_D = torch.zeros(len(self._hashes), dtype=torch.float64, device=device)
        targets_D = torch.zeros_like(sums_D)
        last_row = -1
        for number, start in enumerate(range(0, len(self._parts_to_evaluate), processes.world_size)):
            if number % _STOP_CHECK_INTERVAL == 0 and (stop := agreed_stop()) is not None:
                return stop
            own = start + processes.rank
            counts = own < len(self._parts_to_evaluate)
            own = own if counts else start  # repeats a part that does not count, so that all ranks call the model
            batch = self._parts.batch(
                self._parts_to_evaluate[own : own + 1], int(counts), isolate=self._loss_function.isolates
            ).to(device)
            if not batch.num_targets and processes.world_size == 1:
                continue
            row = int(self._row_of_part[own])
            sums_D[row] += self._loss_function(model, batch)[0]
            targets_D[row] += batch.num_targets
            if on_document is not None and row > last_row:
                last_row = row
                on_document(row)
        losses, targets = processes.sum(sums_D), processes.sum(targets_D)
        self.measured = [int(document) for document, count in zip(self._documents, targets, strict=True) if count]
        return DocumentLosses(
            step=step,
            num_held_out=self._num_held_out,
            documents=[text for text, count in zip(self._hashes, targets, strict=True) if count],
            num_targets=[int(count) for count in targets if count],
            losses=[loss for loss, count in zip(losses, targets, strict=True) if count],
        )
