"""The losses of methods that learn preferences. Each is the mean over the samples of the global batch.

Here, π and r are the log-probabilities of an answer under the trained model and under the reference, summed over its
tokens, and c and j are the chosen and the rejected answer of a pair; ``n`` is the number of tokens of an answer.

| method       | loss                                                                     | source              |
|--------------|--------------------------------------------------------------------------|---------------------|
| dpo          | -log σ(β (π_c - r_c - (π_j - r_j)))                                      | arXiv 2305.18290, 7 |
| dpo, ``ipo`` | ((π_c - r_c) / n_c - (π_j - r_j) / n_j - 1 / (2 β))²                     | arXiv 2310.12036, 17|
| kto          | w_d (1 - σ(β (π - r - z))) if desirable, else w_u (1 - σ(β (z - π + r))) | arXiv 2402.01306, 8 |
| orpo         | -p_c - β log σ(o_c - o_j) with p = π / n and o = p - log(1 - e^p)        | arXiv 2403.07691, 6 |

The sources are papers with the number of the equation: Rafailov et al. 2023, Azar et al. 2023 (with means over tokens,
as in TRL), Ethayarajh et al. 2024, and Hong et al. 2024.

z estimates the divergence of the model from the reference: the mean of π - r over answers to other prompts, for the
samples of the global batch, and at least 0. No gradient passes through it. Since it does not depend on the division
into micro-batches, neither does the loss of KTO.

The minimum of IPO is finite even for pairs that the model always ranks correctly. TRL's ORPO takes the mean of -p_c
over the tokens of a batch, and includes the prompt; here, as in the paper, it is a mean over the answer's tokens.

Shapes: S samples, R rows (for pairs 2 S, the chosen ones first), T tokens, K positions with logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from zeta_core.contract.job.status import StopAction
from zeta_core.data.sequences import IGNORED, MicroBatch, Sequences, micro_batches
from zeta_core.failures import InvalidModel
from zeta_core.objective.loss import STOP_CHECK_INTERVAL, Convention, LossFunction, Metrics, shifted
from zeta_core.objective.preference.sequences import AnswerBatch, LabeledAnswers
from zeta_core.parallel.processes import Engine

_SMALLEST = 1e-7  # of 1 - p, so that the odds of a certain answer are finite


@dataclass(frozen=True)
class PreferenceLoss(LossFunction):
    """Calls a model as `LossFunction` does, and returns the sum of the samples' losses."""

    beta: float = 0.1

    is_likelihood: ClassVar[bool] = False
    has_reference: ClassVar[bool] = True

    def log_probabilities(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The log-probability of each row's answer, summed over its tokens, in float32; and the auxiliary loss."""
        losses_R, _, auxiliary = self.separate_rows(model, batch)
        return -losses_R, auxiliary

    def take_sums(self) -> torch.Tensor | None:
        """The sums over the samples since the last call, for `metrics`."""
        taken = torch.stack(self.sums).sum(0) if self.sums else None
        self.sums.clear()
        return taken


def preference_loss(
    loss_function: LossFunction,
    method: str,
    name: str,
    *,
    beta: float,
    kind: str = "sigmoid",
    weights: tuple[float, float] = (1.0, 1.0),
) -> PreferenceLoss:
    """The loss of ``method`` for a model; ``kind`` is DPO's ``sigmoid`` or ``ipo``, and ``weights`` are those of KTO.

    Raises `InvalidModel` if the model does not return its logits.
    """
    if loss_function.convention is not Convention.LOGITS:
        raise InvalidModel(
            f"{name} returns a loss but no logits, and method {method!r} needs the log-probability of each answer; "
            "let its forward return logits."
        )
    common = vars(loss_function)
    match method:
        case "kto":
            return KtoLoss(**common, beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
        case "orpo":
            return OrpoLoss(**common, beta=beta)
        case _:
            return DpoLoss(**common, beta=beta, kind=kind)


# --- Pairs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PairLoss(PreferenceLoss):
    """The common part of the losses of pairs: their rewards."""

    def record(self, chosen_S: torch.Tensor, rejected_S: torch.Tensor, counts_S: torch.Tensor) -> None:
        """Add the rewards of the pairs to the sums, and count the pairs whose chosen answer has the higher reward."""
        with torch.no_grad():
            prefers_S = (chosen_S > rejected_S).to(chosen_S.dtype)
            rewards = torch.stack((chosen_S, rejected_S, prefers_S, torch.ones_like(chosen_S)))
            self.sums.append((rewards * counts_S).sum(1))

    def metrics(self, sums: Sequence[float] | None) -> Metrics:
        if sums is None:
            return Metrics()
        chosen, rejected, prefers, num_pairs = sums
        mean = 1 / max(1.0, num_pairs)
        margin = (chosen - rejected) * mean
        rewards = {"chosen": chosen * mean, "rejected": rejected * mean, "margin": margin, "accuracy": prefers * mean}
        return Metrics(rewards=rewards)


@dataclass(frozen=True)
class DpoLoss(_PairLoss):
    """DPO, or IPO with the ``kind`` "ipo". The reward of an answer is β (π - r), for IPO per token."""

    kind: str = "sigmoid"

    def __call__(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the sum of the losses of the pairs that count, and the auxiliary loss."""
        assert isinstance(batch, AnswerBatch)
        log_probs_R, auxiliary = self.log_probabilities(model, batch)
        gained_R = log_probs_R - batch.reference_R
        if self.kind == "ipo":
            gained_R = gained_R / num_answer_tokens(batch)
        chosen_S, rejected_S = (self.beta * gained_R).chunk(2)
        self.record(chosen_S, rejected_S, batch.counts_S)
        if self.kind == "ipo":
            losses_S = ((chosen_S - rejected_S) / self.beta - 1 / (2 * self.beta)).square()
        else:
            losses_S = -F.logsigmoid(chosen_S - rejected_S)
        return (losses_S * batch.counts_S).sum(), auxiliary


@dataclass(frozen=True)
class OrpoLoss(_PairLoss):
    """ORPO, which needs no reference. The reward of an answer is β times its mean log-probability per token."""

    has_reference: ClassVar[bool] = False

    def __call__(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the sum of the losses of the pairs that count, and the auxiliary loss."""
        assert isinstance(batch, AnswerBatch)
        log_probs_R, auxiliary = self.log_probabilities(model, batch)
        chosen_S, rejected_S = (log_probs_R / num_answer_tokens(batch)).chunk(2)
        self.record(self.beta * chosen_S, self.beta * rejected_S, batch.counts_S)
        losses_S = -chosen_S - self.beta * F.logsigmoid(_log_odds(chosen_S) - _log_odds(rejected_S))
        return (losses_S * batch.counts_S).sum(), auxiliary


def num_answer_tokens(batch: MicroBatch) -> torch.Tensor:
    """The number of target tokens of each row, (R,)."""
    return (shifted(batch.labels_BT) != IGNORED).sum(1)


def _log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p))."""
    return log_p - torch.log((-torch.expm1(log_p)).clamp(min=_SMALLEST))


# --- Labeled answers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KtoLoss(PreferenceLoss):
    """KTO, for answers that are desirable or not. The reward of an answer is β (π - r)."""

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def before_batch(
        self,
        engine: Engine,
        sequences: Sequences,
        window: NDArray[np.int64],
        micro_batch: int,
        agreed_stop: Callable[[], StopAction | None] = lambda: None,
    ) -> StopAction | None:
        """Estimate z for the samples of a global batch. Dropout is off, as it was for the reference."""
        assert isinstance(sequences, LabeledAnswers)
        processes, mismatched = engine.processes, sequences.mismatched
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        shares = micro_batches(window, micro_batch=micro_batch, world_size=processes.world_size, rank=processes.rank)
        with engine.evaluating() as model:
            for number, (rows, num_counting) in enumerate(shares):
                if number % STOP_CHECK_INTERVAL == 0 and (stop := agreed_stop()) is not None:
                    return stop
                batch = mismatched.batch(rows, num_counting, isolate=self.isolates).to(engine.device)
                log_probs_R, _ = self.log_probabilities(model, batch)
                reference_R = torch.from_numpy(mismatched.reference_R[rows]).to(engine.device)
                total += (log_probs_R - reference_R)[:num_counting].double().sum()
        sequences.divergence = max(0.0, processes.sum(total.reshape(1))[0] / max(1, len(window)))
        return None

    def __call__(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the sum of the losses of the answers that count, and the auxiliary loss."""
        assert isinstance(batch, AnswerBatch)
        log_probs_S, auxiliary = self.log_probabilities(model, batch)
        rewards_S, anchor = self.beta * (log_probs_S - batch.reference_R), self.beta * batch.divergence
        sign_S = 2 * batch.desirable_S - 1
        weights_S = torch.where(batch.desirable_S > 0, self.desirable_weight, self.undesirable_weight)
        losses_S = weights_S * (1 - torch.sigmoid(sign_S * (rewards_S - anchor)))
        with torch.no_grad():
            undesirable_S = 1 - batch.desirable_S
            is_right_S = (sign_S * (rewards_S - anchor) > 0).to(rewards_S.dtype)
            sums = (
                rewards_S * batch.desirable_S,
                batch.desirable_S,
                rewards_S * undesirable_S,
                undesirable_S,
                is_right_S,
                torch.full_like(rewards_S, batch.divergence),
            )
            self.sums.append((torch.stack(sums) * batch.counts_S).sum(1))
        return (losses_S * batch.counts_S).sum(), auxiliary

    def metrics(self, sums: Sequence[float] | None) -> Metrics:
        """The mean rewards of desirable (chosen) and undesirable (rejected) answers.

        ``accuracy`` is the share of answers whose reward is on the right side of β z, and ``kl`` is z.
        """
        if sums is None:
            return Metrics()
        chosen, rejected = sums[0] / max(1.0, sums[1]), sums[2] / max(1.0, sums[3])
        number = max(1.0, sums[1] + sums[3])
        rewards = {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected}
        return Metrics(rewards={**rewards, "accuracy": sums[4] / number, "kl": sums[5] / number})
