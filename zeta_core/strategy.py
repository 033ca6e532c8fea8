"""Which engine trains a plan: the whole model on every process, or one of the two that split it."""

from __future__ import annotations

from typing import Any

from torch import nn

from zeta_core.parallel import Engine, Processes, Replicated
from zeta_core.plan import Plan
from zeta_core.sharded import Sharded
from zeta_core.zero import Zero, zero_config


def build_engine(
    model: nn.Module,
    plan: Plan,
    processes: Processes,
    *,
    blocks: list[nn.Module],
    deepspeed: bool | int | dict[str, Any] | str | None,
) -> Engine:
    """The engine of the plan's strategy, with its assertions done."""
    match plan.strategy:
        case "fsdp2":
            return Sharded(model, plan, processes, blocks=blocks)
        case "zero":
            assert deepspeed
            return Zero(model, plan, processes, blocks=blocks, config=zero_config(deepspeed, plan))
        case _:
            return Replicated(model, plan, processes, blocks=blocks)
