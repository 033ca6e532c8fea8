"""Usual learning rates by optimizer and kind of run, and advice about other rates.

A rate outside these ranges is not an error, and is used as set. The ranges are wide, so that a warning is meaningful:
they extend beyond the smallest and largest rates that are known to work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from zeta_core.contract.job.advice import Advice
from zeta_core.contract.spec.options import Optimizer

TrainingKind = Literal[
    "training from scratch", "fine-tuning all weights", "training a LoRA adapter", "learning preferences"
]

# The rate of each optimizer relative to that of AdamW, for the smallest and the largest usual rate.
#   sgd        momentum 0.9 and no division by the gradient's size: up to some hundred times AdamW's
#   lion       its update has the size of its rate: 3 to 10 times smaller (Chen et al. 2023, arXiv 2302.06675, sec. 5)
#   adafactor  multiplied by each weight's own size: 1e-3 to 1e-2 for T5 (Shazeer, Stern 2018, arXiv 1804.04235)
#   muon       scaled to AdamW's size of updates (Liu et al. 2025, arXiv 2502.16982, sec. 2.2)
_OVER_ADAMW: dict[Optimizer, tuple[float, float]] = {
    "adamw": (1, 1),
    "sgd": (10, 1000),
    "lion": (0.05, 0.5),
    "adafactor": (1, 10),
    "muon": (1, 1),
}


@dataclass(frozen=True)
class UsualRates:
    """From ``low`` to ``high``, both usual; ``typical`` is a good first try."""

    low: float
    typical: float
    high: float


def pretraining_rate(num_parameters: int) -> float:
    """AdamW's peak rate for a model of this size: Kaplan et al. 2020 (arXiv 2001.08361), equation D.1.

    1.3e-3 at 1 M parameters, 6e-4 at 135 M, 3.5e-4 at 1 B; not below 1e-4, where the formula ends.
    """
    return max(1e-4, 0.003239 - 0.0001395 * math.log(max(1000, num_parameters)))


def usual_rates(optimizer: Optimizer, training_kind: TrainingKind, num_parameters: int) -> UsualRates:
    """The usual rates; ``num_parameters`` are those of the whole model.

    | AdamW        | low   | typical | high        | known to work                                               |
    |--------------|-------|---------|-------------|-------------------------------------------------------------|
    | from scratch | F/100 | F       | 10 F        | 6e-4 for 125 M, 6e-5 for 175 B (Brown et al. 2020, arXiv    |
    |              |       |         |             | 2005.14165, table 2.1); small models allow more             |
    | all weights  | 1e-7  | 2e-5    | 3 F; higher | 5e-6 (Lambert et al. 2024, arXiv 2411.15124), 2e-5 (Touvron |
    |              |       |         | rates train | et al. 2023, arXiv 2307.09288), 1e-3 for 135 M and 360 M    |
    |              |       |         | from scratch| (huggingface/alignment-handbook, recipes/smollm2)           |
    | LoRA         | 1e-6  | 2e-4    | 20 F, but   | 1e-4 and 2e-4 (Dettmers et al. 2023, arXiv 2305.14314): ten |
    |              |       |         | 1e-2        | times that of all weights                                   |
    | preferences  | 1e-9  | 1e-6    | 1e-4        | 1e-6 (Rafailov et al. 2023, arXiv 2305.18290, appendix B),  |
    |              |       |         |             | 5e-6 with LoRA (alignment-handbook, recipes/zephyr-7b-beta),|
    |              |       |         |             | 8e-6 for ORPO (Hong et al. 2024, arXiv 2403.07691)          |

    F is `pretraining_rate`.
    """
    formula = pretraining_rate(num_parameters)
    rates = {
        "training from scratch": UsualRates(formula / 100, formula, 10 * formula),
        "fine-tuning all weights": UsualRates(1e-7, 2e-5, 3 * formula),
        "training a LoRA adapter": UsualRates(1e-6, 2e-4, min(1e-2, 20 * formula)),
        "learning preferences": UsualRates(1e-9, 1e-6, 1e-4),
    }[training_kind]
    low, high = _OVER_ADAMW[optimizer]
    return UsualRates(rates.low * low, rates.typical * math.sqrt(low * high), rates.high * high)


def unusual_rate(
    learning_rate: float, optimizer: Optimizer, training_kind: TrainingKind, num_parameters: int
) -> Advice | None:
    """Advice about an unusual learning rate; None for a usual one."""
    usual = usual_rates(optimizer, training_kind, num_parameters)
    if usual.low <= learning_rate <= usual.high:
        return None
    typical = rounded(usual.typical)
    high = learning_rate > usual.high
    relation = "above" if high else "below"
    effect = "The loss may rise instead of falling" if high else "The model may hardly change"
    return Advice(
        code="unusual_learning_rate",
        message=f"learning_rate is {learning_rate:g}, {relation} the usual range for {training_kind} with {optimizer} "
        f"({rounded(usual.low):g} to {rounded(usual.high):g}). {effect}.",
        hint=f"Start with {typical:g}.",
        patch={"learning_rate": typical},
        evidence={
            "learning_rate": learning_rate,
            "usual_low": rounded(usual.low),
            "usual_high": rounded(usual.high),
            "num_parameters": num_parameters,
        },
    )


def rounded(rate: float) -> float:
    """``rate`` rounded to one significant digit."""
    return float(f"{rate:.0e}")
