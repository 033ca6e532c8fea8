"""Direct preference optimization (DPO): preference pairs, their loss, and the reference model.

The loss of a pair is -log σ(β (π_c - r_c - (π_r - r_r))). Here, π and r are the log-probabilities of the chosen and
the rejected answer under the trained model and under the reference (Rafailov et al. 2023, arXiv 2305.18290, equation
7). The loss of IPO is (π_c - r_c - (π_r - r_r) - 1 / (2 β))² (Azar et al. 2023, arXiv 2310.12036, equation 17); its
minimum is finite even for pairs that the model always ranks correctly.

The mean over the pairs of the global batch is minimized. The reference is the initial model of the run; with LoRA, it
is the base, because a new adapter adds nothing. Its log-probabilities are computed once, before the first step, and
stored in every checkpoint, because the initial model is not available later.

Shapes: P pairs, R = 2 P answers, the chosen ones first, T tokens, K positions with logits, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from zeta_core.checkpoint.staging import Tensors
from zeta_core.checkpoint.training_state import StoredState
from zeta_core.data.sequences import Batch, Overlong, Sequences, micro_batches
from zeta_core.data.tokens import TokenFile
from zeta_core.failures import CannotResume, InvalidData, InvalidModel
from zeta_core.objective.loss import Convention, LossFunction, Metrics
from zeta_core.parallel.processes import Engine


@dataclass(frozen=True)
class PairBatch(Batch):
    """Answers with their prompts, one per row. ``num_targets`` is the number of pairs that count."""

    reference_R: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    counts_P: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # 1, or 0 for a filler pair

    def to(self, device: torch.device) -> PairBatch:
        moved = dict[str, Any](vars(super().to(device)))
        moved |= {"reference_R": self.reference_R.to(device), "counts_P": self.counts_P.to(device)}
        return PairBatch(**moved)


class Pairs(Sequences):
    """Preference pairs by index. Each answer has its own row, with its prompt. Targets are counted in pairs."""

    def __init__(self, tokens: TokenFile, seq_len: int, *, overlong: Overlong | None) -> None:
        if not tokens.has_pairs:
            raise InvalidData("method 'dpo' needs rows with prompt, chosen and rejected; the data has none.")
        super().__init__(tokens, seq_len, pack=False, overlong=overlong, group_size=2)
        self.reference_2P = np.zeros(2 * len(self), dtype=np.float32)  # per pair: chosen, rejected

    def __len__(self) -> int:
        return super().__len__() // 2

    @property
    def longest(self) -> int:
        """Twice the number of tokens of the longest answer with its prompt, because a pair has two rows."""
        return 2 * super().longest

    @property
    def source_bounds(self) -> NDArray[np.int64]:
        return super().source_bounds // 2

    def num_tokens(self, indices: NDArray[np.int64]) -> int:
        return super().num_tokens(_answers(indices))

    def num_positions(self, indices: NDArray[np.int64]) -> int:
        return super().num_positions(_answers(indices))

    def num_target_tokens(self, indices: NDArray[np.int64]) -> int:
        return super().num_target_tokens(_answers(indices))

    def num_targets(self, indices: NDArray[np.int64]) -> int:
        """The number of pairs, because the mean loss over pairs is minimized, regardless of the answers' lengths."""
        return len(indices)

    def batch(self, indices: NDArray[np.int64], num_counting: int, *, isolate: bool = True) -> PairBatch:
        answers_R = _answers(indices)
        rows = dict[str, Any](vars(super().batch(answers_R, len(answers_R), isolate=isolate)))
        counts_P = (np.arange(len(indices)) < num_counting).astype(np.float32)
        rows |= {
            "num_targets": num_counting,
            "reference_R": torch.from_numpy(self.reference_2P[answers_R]),
            "counts_P": torch.from_numpy(counts_P),
        }
        return PairBatch(**rows)


def _answers(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """The documents of pairs: all chosen answers, then all rejected ones."""
    return np.concatenate((2 * indices, 2 * indices + 1))


@dataclass(frozen=True)
class DpoLoss(LossFunction):
    """Calls a model as `LossFunction` does, and returns the sum of the pairs' losses."""

    beta: float = 0.1
    kind: str = "sigmoid"
    is_likelihood: ClassVar[bool] = False

    @staticmethod
    def of(loss_function: LossFunction, beta: float, name: str, *, kind: str = "sigmoid") -> DpoLoss:
        """The loss for a model; ``kind`` is ``sigmoid`` (DPO) or ``ipo``.

        Raises `InvalidModel` if the model does not return its logits.
        """
        if loss_function.convention is not Convention.LOGITS:
            raise InvalidModel(
                f"{name} returns a loss but no logits, and method 'dpo' needs the log-probability of each answer; "
                "let its forward return logits."
            )
        return DpoLoss(**vars(loss_function), beta=beta, kind=kind)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the sum of the losses of the pairs that count, and None."""
        assert isinstance(batch, PairBatch)
        gained_R = self.log_probabilities(model, batch) - batch.reference_R
        chosen_P, rejected_P = (self.beta * gained_R).chunk(2)
        with torch.no_grad():
            prefers_P = (chosen_P > rejected_P).to(chosen_P.dtype)
            rewards = torch.stack((chosen_P, rejected_P, prefers_P, torch.ones_like(chosen_P)))
            self.sums.append((rewards * batch.counts_P).sum(1))
        if self.kind == "ipo":
            losses_P = ((chosen_P - rejected_P) / self.beta - 1 / (2 * self.beta)).square()
        else:
            losses_P = -F.logsigmoid(chosen_P - rejected_P)
        return (losses_P * batch.counts_P).sum(), None

    def log_probabilities(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The log-probability of each row's answer, summed over its tokens, in float32."""
        return -self.separate_rows(model, batch)[0]

    def take_sums(self) -> torch.Tensor | None:
        """Sums over the pairs since the last call.

        They are the rewards of the chosen and of the rejected answers, β (π - r), the number of pairs whose chosen
        answer has the higher reward, and the number of pairs.
        """
        taken = torch.stack(self.sums).sum(0) if self.sums else None
        self.sums.clear()
        return taken

    def metrics(self, sums: Sequence[float] | None) -> Metrics:
        return Metrics(rewards=None if sums is None else mean_rewards(sums))


def mean_rewards(sums: Sequence[float]) -> dict[str, float]:
    """The means over the pairs, from the sums of `DpoLoss.take_sums` over all ranks."""
    chosen, rejected, prefers, num_pairs = sums
    mean = 1 / max(1.0, num_pairs)
    return {
        "chosen": chosen * mean,
        "rejected": rejected * mean,
        "margin": (chosen - rejected) * mean,
        "accuracy": prefers * mean,
    }


# --- The reference ----------------------------------------------------------------------------------------------------

_FILE_KEYS = ("train", "eval")  # in the order of the arguments


def prepare_reference(
    engine: Engine, loss_function: DpoLoss, pairs: Sequence[Pairs], micro_batch: int, stored: StoredState | None
) -> Tensors:
    """Set the reference of the training pairs and of the held-out pairs: computed now, or loaded from the resumed run.

    Returns the values to store with the run. All ranks must call this together. Raises `CannotResume`.
    """
    kept: Tensors = {}
    given: Tensors = {} if stored is None else stored.constant_tensors()
    for key, some in zip(_FILE_KEYS, pairs, strict=False):
        if stored is None:
            some.reference_2P = compute_reference(engine, loss_function, some, micro_batch)
        elif key not in given or len(given[key]) != len(some.reference_2P):
            raise CannotResume("The checkpoint contains no reference for these pairs; start from its weights instead.")
        else:
            some.reference_2P = given[key].numpy()
        kept[key] = torch.from_numpy(some.reference_2P)
    return kept


def compute_reference(
    engine: Engine, loss_function: DpoLoss, pairs: Pairs, micro_batch: int, *, which: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """The log-probabilities of all answers under the current model.

    With ``which``, only those of these pairs are computed, and the others are 0. Each rank computes its share.
    """
    processes = engine.processes
    log_probs = np.zeros(2 * len(pairs), dtype=np.float64)
    every = np.arange(len(pairs)) if which is None else which
    shares = micro_batches(every, micro_batch=micro_batch, world_size=processes.world_size, rank=processes.rank)
    with engine.evaluating() as model:
        for rows, num_counting in shares:
            batch = pairs.batch(rows, num_counting, isolate=loss_function.isolates).to(engine.device)
            log_probs_R = loss_function.log_probabilities(model, batch).double().cpu().numpy()
            log_probs[_answers(rows[:num_counting])] = np.concatenate(
                [part[:num_counting] for part in np.split(log_probs_R, 2)]
            )
    total = engine.processes.sum(torch.from_numpy(log_probs).to(engine.device))
    return np.array(total, dtype=np.float32)
