"""Diagnosing divergence: a loss that stays far above its minimum, and values that are not finite.

A warning is useful only if healthy runs never get one. Their loss is noisy, has spikes that recover within tens of
steps (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1), and starts high if the model is badly initialized. The
monitor therefore compares the smoothed loss with its own minimum over many consecutive steps:

- smoothed: exponentially, over about a twentieth of the run, 5 to 50 steps;
- far above: by more than half a nat, and by three times the usual difference between the loss and its smoothed value
  (one nat until that is known);
- not recovering: the loss is less than halfway back to its minimum;
- persistent: for twice as many steps as are smoothed over. A quarter of that suffices if the loss is, after the
  warm-up, also one nat worse than a uniform guess among all tokens (ln V), which happens only if a run has unlearned
  what it knew.

For comparison, `KillLossSpike` of mosaicml/llm-foundry tests for twice the mean of the last 100 losses, 5 times in a
row, or for half of them above 10 nats.
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
FAR_ABOVE_DEVIATIONS = 3.0  # mean absolute differences between the loss and its smoothed value
INITIAL_DEVIATION = 1.0  # nats; that of the noisiest common losses, used until enough steps are known
WORSE_THAN_GUESSING = 1.0  # nats above ln V
STEPS_IN_EVIDENCE = 16
MAX_NAMES = 5

_WEIGHT = "weight of "


@dataclass
class _Smoothed:
    """An exponential mean over about ``steps``, with bias correction (Kingma, Ba 2014, section 3)."""

    steps: int
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> float:
        keep = 1 - 1 / self.steps
        self.total = keep * self.total + (1 - keep) * value
        self.weight = keep * self.weight + (1 - keep)
        return self.total / self.weight


class DivergenceMonitor:
    """Observes the loss of every step, and gives advice at most once if it diverges.

    ``vocab_size`` is the number of tokens that the model distinguishes, if known; ``usual`` contains the usual learning
    rates for this run.
    """

    def __init__(
        self,
        plan: Plan,
        advise: Callable[[Advice], None],
        *,
        vocab_size: int | None,
        usual: UsualRates,
        supports_bf16: bool,
    ) -> None:
        self._plan, self._advise, self._usual, self._supports_bf16 = plan, advise, usual, supports_bf16
        self._guess_loss = math.inf if not vocab_size else math.log(vocab_size) + WORSE_THAN_GUESSING
        self._horizon = min(50, max(5, plan.total_steps // 20))
        self._smoothed, self._deviations = _Smoothed(self._horizon), _Smoothed(self._horizon)
        self._recent: deque[dict[str, JsonValue]] = deque(maxlen=STEPS_IN_EVIDENCE)
        self._num_steps = 0
        self._last = self._lowest = math.inf
        self._lowest_step = 0
        self._usual_deviation = INITIAL_DEVIATION  # at the minimum
        self._peak = -math.inf  # since the minimum
        self._steps_above = 0
        self._has_advised = False

    def record_step(self, step: int, *, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Record one applied update: the mean ``loss`` of its targets, in nats, and its learning rate."""
        self._recent.append({"step": step, "loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm})
        self._num_steps += 1
        deviation = self._deviations.add(abs(loss - self._last)) if self._last < math.inf else 0.0
        smoothed = self._last = self._smoothed.add(loss)
        if smoothed < self._lowest:
            self._lowest, self._lowest_step = smoothed, step
            self._usual_deviation = deviation if self._num_steps >= self._horizon else max(INITIAL_DEVIATION, deviation)
            self._peak, self._steps_above = -math.inf, 0
            return
        self._peak = max(self._peak, smoothed)
        margin = max(FAR_ABOVE, FAR_ABOVE_DEVIATIONS * self._usual_deviation)
        is_above = smoothed > self._lowest + margin and smoothed > (self._lowest + self._peak) / 2
        self._steps_above = self._steps_above + 1 if is_above else 0
        patience = 2 * self._horizon
        if smoothed > self._guess_loss and step > self._plan.warmup_steps:
            patience = max(5, patience // 4)
        if self._steps_above >= patience and not self._has_advised:
            self._has_advised = True
            self._advise(self._divergence_advice(step, smoothed))

    def _divergence_advice(self, step: int, smoothed: float) -> Advice:
        patch = self._stabilizing_patch()
        return Advice(
            code="diverging_loss",
            message=f"Loss is diverging: smoothed {smoothed:.3g} at step {step}, up from {self._lowest:.3g} at step "
            f"{self._lowest_step}.",
            hint=f"Cancel this run, and train again with {_in_words(patch)}.",
            patch=patch,
            evidence={
                "smoothed_loss": round(smoothed, 4),
                "lowest_smoothed_loss": round(self._lowest, 4),
                "lowest_at_step": self._lowest_step,
                **self._figures(step),
            },
        )

    def non_finite_error(self, step: int, *, quantity: str, ranks: list[int], tensors: list[str]) -> NonFiniteLoss:
        """The error for a loss or gradient (``quantity``) of a step that is not finite.

        ``ranks`` are those on which it began; ``tensors`` are the first weights or gradients with such values.
        """
        message = f"The {quantity} of step {step} is not finite; the update was not applied."
        evidence: dict[str, JsonValue] = {"ranks": list[JsonValue](ranks)}
        return self._error_with_fix(message, step, tensors, evidence, updates=step - 1, data="the data of that step")

    def eval_non_finite_error(self, step: int, *, tensors: list[str]) -> NonFiniteLoss:
        """The error for a loss on the held-out data after ``step`` that is not finite; its causes are the same."""
        message = f"The loss on the held-out data after step {step} is not finite."
        return self._error_with_fix(message, step, tensors, {}, updates=step, data="the held-out data")

    def _error_with_fix(
        self, message: str, step: int, tensors: list[str], evidence: dict[str, JsonValue], *, updates: int, data: str
    ) -> NonFiniteLoss:
        """The error with its fix. ``updates`` were applied before it; ``data`` may also be the cause."""
        weights = [name.removeprefix(_WEIGHT) for name in tensors if name.startswith(_WEIGHT)]
        if self._plan.mixed_precision == "fp16":
            patch: Patch = {"mixed_precision": "bf16" if self._supports_bf16 else "no"}
            hint = "The largest value of fp16 is 65,504; use mixed_precision 'bf16' or 'no', which have a larger range."
        elif not updates:
            patch = {}
            hint = (
                f"The model has weights that are not finite, such as {weights[0]}; repair or replace them."
                if weights
                else "No update preceded it, so no option can be the cause; check the model's forward."
            )
        else:
            patch = self._stabilizing_patch()
            hint = f"Train with {_in_words(patch)}; if that does not help, check {data}."
        evidence = {**self._figures(step), **evidence, "tensors": list[JsonValue](tensors)}
        return NonFiniteLoss(message, hint=hint, patch=patch or None, evidence=evidence)

    def _figures(self, step: int) -> dict[str, JsonValue]:
        """``learning_rate`` is the schedule's peak.

        ``recent`` has the step, loss, learning rate and gradient norm of the last steps.
        """
        return {"step": step, "learning_rate": self._plan.learning_rate, "recent": list[JsonValue](self._recent)}

    def _stabilizing_patch(self) -> Patch:
        """A usual learning rate well below the current one, a longer warm-up, and gradient clipping."""
        plan = self._plan
        lower = plan.learning_rate / 5
        rate = lower if plan.learning_rate <= self._usual.high else min(lower, self._usual.typical)
        patch: Patch = {"learning_rate": rounded(rate)}
        if plan.warmup_steps < 0.1 * plan.total_steps:
            patch["warmup_steps"] = 0.1
        if plan.max_grad_norm > 1:
            patch["max_grad_norm"] = 1.0
        return patch


def find_non_finite(named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """The first weights and gradients with values that are not finite, such as ``gradient of lm_head.weight``."""
    names: list[str] = []
    for name, parameter in named:
        for kind, tensor in ((_WEIGHT, parameter.detach()), ("gradient of ", parameter.grad)):
            if tensor is not None and not _is_finite(tensor):
                names.append(f"{kind}{name}")
        if len(names) >= MAX_NAMES:
            break
    return names[:MAX_NAMES]


def _is_finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(local).all())


def _in_words(patch: Patch) -> str:
    return " and ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in patch.items()
    )
