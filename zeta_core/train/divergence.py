"""Whether a run still learns: a loss that stays far above what it had reached, and numbers that are not finite.

A warning means something only if healthy runs never get it. Their loss is noisy from step to step, has spikes that
heal within tens of steps (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1), and begins high where a model is
badly initialised. So what is watched is the smoothed loss, against its own minimum, for many steps in a row:

- smoothed: exponentially, over about a twentieth of the run, 5 to 50 steps;
- far above: more than half a nat, and three times what the loss usually misses its smoothed value by (a nat, until
  that is known);
- not healing: it has come less than half of the way back;
- for long: twice the smoothing's steps in a row. Four times sooner where it is also a nat worse than guessing among all
  tokens (ln V), after the warm-up, which only a run that has lost what it knew is.

For comparison: twice the mean of the last 100 losses, 5 times in a row, or half of them above 10 nats
(mosaicml/llm-foundry, `KillLossSpike`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from pydantic import JsonValue
from torch import nn
from torch.distributed.tensor import DTensor

from zeta_core.contract.job.advice import Advice, Patch
from zeta_core.failures import NonFiniteLoss
from zeta_core.optim.rates import UsualRates, rounded
from zeta_core.plan import Plan

FAR_ABOVE = 0.5  # nats
FAR_ABOVE_MISSES = 3.0  # mean absolute differences of the loss to its smoothed value
UNKNOWN_MISS = 1.0  # nats; that of the noisiest usual losses, until as many steps are known as are smoothed over
WORSE_THAN_GUESSING = 1.0  # nats above ln V
STEPS_REMEMBERED = 16
NAMES_TOLD = 5

_WEIGHT = "weight of "


@dataclass
class _Smoothed:
    """An exponential mean over about ``steps``, without the bias of its start (Kingma, Ba 2014, section 3)."""

    steps: int
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> float:
        keep = 1 - 1 / self.steps
        self.total = keep * self.total + (1 - keep) * value
        self.weight = keep * self.weight + (1 - keep)
        return self.total / self.weight


class DivergenceMonitor:
    """Is told each step; speaks at most once of a loss that rises, and knows what to say of one that is not finite.

    ``vocabulary`` is the number of tokens that the model tells apart, where that is known; ``usual`` the learning rates
    that are usual for such a run.
    """

    def __init__(
        self,
        plan: Plan,
        say: Callable[[Advice], None],
        *,
        vocabulary: int | None,
        usual: UsualRates,
        supports_bf16: bool,
    ) -> None:
        self._plan, self._say, self._usual, self._supports_bf16 = plan, say, usual, supports_bf16
        self._guessing = math.inf if not vocabulary else math.log(vocabulary) + WORSE_THAN_GUESSING
        self._horizon = min(50, max(5, plan.total_steps // 20))
        self._smoothed, self._misses = _Smoothed(self._horizon), _Smoothed(self._horizon)
        self._recent: deque[dict[str, JsonValue]] = deque(maxlen=STEPS_REMEMBERED)
        self._num_steps = 0
        self._last = self._lowest = math.inf
        self._lowest_step = 0
        self._usual_miss = UNKNOWN_MISS  # at the lowest
        self._peak = -math.inf  # since the lowest
        self._steps_above = 0
        self._has_spoken = False

    def step(self, step: int, *, loss: float, learning_rate: float, grad_norm: float) -> None:
        """One applied update: the mean ``loss`` of its targets, in nats, and the rate that it was applied with."""
        self._recent.append({"step": step, "loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm})
        self._num_steps += 1
        miss = self._misses.add(abs(loss - self._last)) if self._last < math.inf else 0.0
        smoothed = self._last = self._smoothed.add(loss)
        if smoothed < self._lowest:
            self._lowest, self._lowest_step = smoothed, step
            self._usual_miss = miss if self._num_steps >= self._horizon else max(UNKNOWN_MISS, miss)
            self._peak, self._steps_above = -math.inf, 0
            return
        self._peak = max(self._peak, smoothed)
        margin = max(FAR_ABOVE, FAR_ABOVE_MISSES * self._usual_miss)
        is_above = smoothed > self._lowest + margin and smoothed > (self._lowest + self._peak) / 2
        self._steps_above = self._steps_above + 1 if is_above else 0
        patience = 2 * self._horizon
        if smoothed > self._guessing and step > self._plan.warmup_steps:
            patience = max(5, patience // 4)
        if self._steps_above >= patience and not self._has_spoken:
            self._has_spoken = True
            self._say(self._diverging(step, smoothed))

    def _diverging(self, step: int, smoothed: float) -> Advice:
        patch = self._calmer()
        return Advice(
            code="diverging_loss",
            message=f"The loss rises: smoothed it is {smoothed:.3g} after step {step}, and was {self._lowest:.3g} "
            f"after step {self._lowest_step}.",
            hint=f"Cancel this run and train with {_in_words(patch)}.",
            patch=patch,
            evidence={
                "smoothed_loss": round(smoothed, 4),
                "lowest_smoothed_loss": round(self._lowest, 4),
                "lowest_at_step": self._lowest_step,
                **self._figures(step),
            },
        )

    def not_finite(self, step: int, *, what: str, ranks: list[int], tensors: list[str]) -> NonFiniteLoss:
        """What to raise where the ``what`` (loss or gradient) of a step is not finite.

        ``ranks`` are those where it began, ``tensors`` the first of the weights or gradients that have such numbers.
        """
        message = f"The {what} of step {step} is not finite; the update was not made."
        evidence: dict[str, JsonValue] = {"ranks": list[JsonValue](ranks)}
        return self._explained(message, step, tensors, evidence, updates=step - 1, data="the data of that step")

    def held_out_not_finite(self, step: int, *, tensors: list[str]) -> NonFiniteLoss:
        """What to raise where the loss on the held-out data after ``step`` is not finite; what made it so is alike."""
        message = f"The loss on the held-out data after step {step} is not finite."
        return self._explained(message, step, tensors, {}, updates=step, data="the held-out data")

    def _explained(
        self, message: str, step: int, tensors: list[str], evidence: dict[str, JsonValue], *, updates: int, data: str
    ) -> NonFiniteLoss:
        """The error with its cure; ``updates`` were made before it, and ``data`` may be to blame as well."""
        weights = [name.removeprefix(_WEIGHT) for name in tensors if name.startswith(_WEIGHT)]
        if self._plan.mixed_precision == "fp16":
            patch: Patch = {"mixed_precision": "bf16" if self._supports_bf16 else "no"}
            hint = "fp16 ends at 65,504: use mixed_precision 'bf16' or 'no', whose range is wider."
        elif not updates:
            patch = {}
            hint = (
                f"The model came with weights that are not finite, {weights[0]} among them; mend it."
                if weights
                else "No update was made before it, so no option is to blame; look at the model's forward."
            )
        else:
            patch = self._calmer()
            hint = f"Train with {_in_words(patch)}; if that does not help, look at {data}."
        evidence = {**self._figures(step), **evidence, "tensors": list[JsonValue](tensors)}
        return NonFiniteLoss(message, hint=hint, patch=patch or None, evidence=evidence)

    def _figures(self, step: int) -> dict[str, JsonValue]:
        """``learning_rate`` is the peak of the schedule; the rate of each of the recent steps is with it."""
        return {"step": step, "learning_rate": self._plan.learning_rate, "recent": list[JsonValue](self._recent)}

    def _calmer(self) -> Patch:
        """A learning rate that is usual, and well below this one; a real warm-up; a bound on the gradient."""
        plan = self._plan
        calmer = plan.learning_rate / 5
        rate = calmer if plan.learning_rate <= self._usual.high else min(calmer, self._usual.typical)
        patch: Patch = {"learning_rate": rounded(rate)}
        if plan.warmup_steps < 0.1 * plan.total_steps:
            patch["warmup_steps"] = 0.1
        if plan.max_grad_norm > 1:
            patch["max_grad_norm"] = 1.0
        return patch


def not_finite_in(named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """The first weights and gradients with numbers that are not finite, such as ``gradient of lm_head.weight``."""
    found: list[str] = []
    for name, parameter in named:
        for kind, tensor in ((_WEIGHT, parameter.detach()), ("gradient of ", parameter.grad)):
            if tensor is not None and not _is_finite(tensor):
                found.append(f"{kind}{name}")
        if len(found) >= NAMES_TOLD:
            break
    return found[:NAMES_TOLD]


def _is_finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(local).all())


def _in_words(patch: Patch) -> str:
    return " and ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in patch.items()
    )
