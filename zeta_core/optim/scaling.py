"""The loss scale of fp16, which keeps gradients within the range of its numbers.

A step whose gradients overflow is not skipped. It is computed again on the same data with half the scale, so the number
of updates, the order of the data and the schedule are the same as with any other precision. The run ends only if
gradients are not finite without scaling. torch's ``GradScaler`` keeps the state, which is part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

SMALLEST = 1.0  # at a smaller scale, the gradients themselves are not finite


class LossScale:
    def __init__(self, device_type: str) -> None:
        self._scaler = torch.amp.GradScaler(device_type)

    def backward(self, loss: torch.Tensor) -> None:
        self._scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, once per step, before they are clipped."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update with finite gradients; the scale doubles after 2,000 updates without an overflow."""
        self._scaler.step(optimizer)
        self._scaler.update()

    def back_off(self) -> float | None:
        """Halve the scale and return it; ``None`` if that can no longer help."""
        scale = self._scaler.get_scale() / 2
        if scale < SMALLEST:
            return None
        self._scaler.update(scale)
        self._scaler.load_state_dict({**self._scaler.state_dict(), "_growth_tracker": 0})
        return scale

    def stored(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def restore(self, stored: Mapping[str, Any]) -> None:
        self._scaler.load_state_dict(dict(stored))
