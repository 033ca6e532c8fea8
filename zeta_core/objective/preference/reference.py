"""The reference model of DPO, IPO and KTO: the log-probabilities of the initial model.

The reference is the initial model of the run; with LoRA, it is the base, because a new adapter adds nothing. Its
log-probabilities are computed once, before the first step, and stored in every checkpoint, because the initial model
is not available later.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from zeta_core.checkpoint.staging import Tensors
from zeta_core.checkpoint.training_state import StoredState
from zeta_core.data.sequences import micro_batches
from zeta_core.failures import CannotResume
from zeta_core.objective.preference.losses import PreferenceLoss
from zeta_core.objective.preference.sequences import AnswerSequences, Referenced
from zeta_core.parallel.processes import Engine

_FILE_KEYS = ("train", "eval")  # in the order of the arguments


def prepare_references(
    engine: Engine,
    loss_function: PreferenceLoss,
    data: Sequence[AnswerSequences],
    micro_batch: int,
    stored: StoredState | None,
) -> Tensors:
    """Set the reference of the training and of the held-out data: computed now, or loaded from the resumed run.

    Returns the values to store with the run. All ranks must call this together. Raises `CannotResume`.
    """
    kept: Tensors = {}
    given: Tensors = {} if stored is None else stored.constant_tensors()
    for start, answers in zip(_FILE_KEYS, data, strict=False):
        for end, rows in answers.referenced.items():
            key = start + end
            if stored is None:
                rows.reference_R = _compute(engine, loss_function, rows, micro_batch, np.arange(len(rows)))
            elif key not in given or len(given[key]) != len(rows.reference_R):
                raise CannotResume(
                    "The checkpoint contains no reference for these answers; start from its weights instead."
                )
            else:
                rows.reference_R = given[key].numpy()
            kept[key] = torch.from_numpy(rows.reference_R)
    return kept


def compute_references(
    engine: Engine, loss_function: PreferenceLoss, answers: AnswerSequences, micro_batch: int, which: NDArray[np.int64]
) -> None:
    """Set the reference of the samples ``which`` to the current model; that of the others is 0."""
    for rows in answers.referenced.values():
        rows.reference_R = _compute(engine, loss_function, rows, micro_batch, which)


def _compute(
    engine: Engine, loss_function: PreferenceLoss, rows: Referenced, micro_batch: int, which: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The log-probabilities of the rows under the current model. Each rank computes its share."""
    processes = engine.processes
    log_probs = np.zeros(len(rows.reference_R), dtype=np.float64)
    shares = micro_batches(which, micro_batch=micro_batch, world_size=processes.world_size, rank=processes.rank)
    with engine.evaluating() as model:
        for indices, num_counting in shares:
            batch = rows.batch(indices, num_counting, isolate=loss_function.isolates).to(engine.device)
            log_probs_R = loss_function.log_probabilities(model, batch)[0].double().cpu().numpy()
            parts = np.split(log_probs_R, len(log_probs_R) // len(indices))
            log_probs[rows.rows(indices[:num_counting])] = np.concatenate([part[:num_counting] for part in parts])
    total = processes.sum(torch.from_numpy(log_probs).to(engine.device))
    return np.array(total, dtype=np.float32)
