"""Building the engine for a plan, and checking that the launcher's settings agree with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from zeta_core.failures import CannotTrain
from zeta_core.parallel.deferred_weights import DeferredWeights
from zeta_core.parallel.fsdp import FullySharded
from zeta_core.parallel.processes import Engine, Processes, Replicated
from zeta_core.parallel.zero import Zero, zero_config
from zeta_core.plan import Plan


def build_engine(
    model: nn.Module,
    plan: Plan,
    processes: Processes,
    *,
    blocks: list[nn.Module],
    deepspeed: bool | int | dict[str, Any] | str | None,
    weights: DeferredWeights | None = None,
) -> Engine:
    """The engine for the plan's strategy. Raises `CannotTrain` if it is not set up as planned.

    ``weights`` are those of a model whose weights were deferred; the engine removes each one after reading it.
    """
    match plan.strategy:
        case "fsdp2":
            return FullySharded(model, plan, processes, blocks=blocks, weights=weights)
        case "zero":
            assert deepspeed
            return Zero(model, plan, processes, blocks=blocks, config=zero_config(deepspeed, plan))
        case _:
            return Replicated(model, plan, processes, blocks=blocks)


def check_launcher(variables: Mapping[str, str], plan: Plan, *, cuda: bool) -> None:
    """Raise `CannotTrain` if the environment configures Accelerate differently from the Trainer's parameters.

    ``variables`` are Accelerate's: from ``accelerate launch`` and its config, or left over from another run. Without
    this check, some would silently change the result, and others would silently be ignored.
    """
    agrees = {
        "ACCELERATE_USE_CPU": (not cuda, "hide the GPUs with CUDA_VISIBLE_DEVICES="),
        "ACCELERATE_USE_FSDP": (plan.strategy == "fsdp2", "pass use_fsdp=True to the Trainer"),
        "ACCELERATE_USE_DEEPSPEED": (plan.strategy == "zero", "pass use_deepspeed to the Trainer"),
        "ACCELERATE_USE_MEGATRON_LM": (False, "use another strategy, because Megatron-LM is not supported"),
        "ACCELERATE_USE_PARALLELISM_CONFIG": (False, "pass use_fsdp or use_deepspeed to the Trainer"),
        "ACCELERATE_MIXED_PRECISION": (
            variables.get("ACCELERATE_MIXED_PRECISION") == plan.mixed_precision,
            f"pass mixed_precision to the Trainer, which uses {plan.mixed_precision!r}",
        ),
        "ACCELERATE_DYNAMO_BACKEND": (plan.compile, "pass compile=True to the Trainer"),
        "FSDP_OFFLOAD_PARAMS": (
            plan.strategy != "fsdp2" or plan.fsdp_cpu_offload,
            "pass fsdp_cpu_offload=True to the Trainer",
        ),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": (False, "pass the file as use_deepspeed"),
    }
    for name, (does, fix) in agrees.items():
        value = variables.get(name, "")
        if value.lower() not in ("", "0", "no", "none", "false") and not does:
            raise CannotTrain(
                f"{name} is {value!r} (set by `accelerate launch` or its config, or left over from another run), which "
                "does not match the Trainer's settings.",
                hint=f"Unset it, or {fix}.",
            )
