"""The memory of DeepSpeed's ZeRO by part, from its configuration (DeepSpeed 0.19, `deepspeed/runtime/zero`).

The model is in the precision of the computation. Its float32 master copy is always sharded, even if the model is in
float32, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from zeta_core.contract.job.memory import MemoryParts
from zeta_core.plan import Plan

FLOAT32_BYTES = 4
DEFAULT_BUCKET = 500_000_000  # values: `reduce_bucket_size` of DeepSpeed
DEFAULT_LIVE = 1_000_000_000  # values: `stage3_max_live_parameters`


@dataclass(frozen=True)
class ZeroSettings:
    """The settings of ``zero_optimization`` that determine memory."""

    stage: int
    bucket_values: int = DEFAULT_BUCKET
    live_values: int = DEFAULT_LIVE

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ZeroSettings:
        """From a complete DeepSpeed configuration."""
        zero: Mapping[str, Any] = config["zero_optimization"]
        return cls(
            stage=int(zero["stage"]),
            bucket_values=_number(zero.get("reduce_bucket_size"), DEFAULT_BUCKET),
            live_values=_number(zero.get("stage3_max_live_parameters"), DEFAULT_LIVE),
        )

    def parts(self, model: nn.Module, num_trained: int, optimizer: int, plan: Plan) -> MemoryParts:
        """The parts of each process; ``optimizer`` is the size of the whole state in bytes."""
        each, ranks = _bytes_per_value(plan), plan.world_size
        whole = each * sum(parameter.numel() for parameter in model.parameters())
        masters = FLOAT32_BYTES * num_trained // ranks
        return MemoryParts(
            weights=(whole // ranks if self.stage == 3 else whole) + masters,
            gradients=each * num_trained // (ranks if self.stage >= 2 else 1),
            optimizer=optimizer // ranks,
        )

    def buffer_bytes(self, model: nn.Module, plan: Plan) -> int:
        """The bucket of gradients to reduce; with stage 3 also the gathered weights.

        Stage 3 gathers at least a whole parameter, and reduces its gradient.
        """
        each = _bytes_per_value(plan)
        if self.stage < 3:
            return each * self.bucket_values
        sizes = [parameter.numel() for parameter in model.parameters()]
        largest = max(sizes, default=0)
        gathered = max(min(self.live_values, sum(sizes)), largest)
        return each * (max(self.bucket_values, largest) + gathered + largest)


def _number(value: object, default: int) -> int:
    return int(value) if isinstance(value, int | float) else default


def _bytes_per_value(plan: Plan) -> int:
    return FLOAT32_BYTES if plan.mixed_precision == "no" else FLOAT32_BYTES // 2
