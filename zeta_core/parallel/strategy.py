"""Which engine trains a plan: the whole model on every process, or one of the two that split it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from zeta_core.failures import CannotTrain
from zeta_core.parallel.processes import Engine, Processes, Replicated
from zeta_core.parallel.sharded import Sharded
from zeta_core.parallel.zero import Zero, zero_config
from zeta_core.plan import Plan


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


def check_launcher(asked: Mapping[str, str], plan: Plan, *, cuda: bool) -> None:
    """Raise `CannotTrain` where the environment asks Accelerate for what the Trainer's parameters do not.

    ``asked`` are Accelerate's variables: of ``accelerate launch`` and its config, or left over from another run. Taken
    from there, some would change the training in silence and others be dropped in silence.
    """
    agrees = {
        "ACCELERATE_USE_CPU": (not cuda, "hide the GPUs with CUDA_VISIBLE_DEVICES="),
        "ACCELERATE_USE_FSDP": (plan.strategy == "fsdp2", "say use_fsdp=True to the Trainer"),
        "ACCELERATE_USE_DEEPSPEED": (plan.strategy == "zero", "say use_deepspeed to the Trainer"),
        "ACCELERATE_USE_MEGATRON_LM": (False, "there is no Megatron-LM here"),
        "ACCELERATE_USE_PARALLELISM_CONFIG": (False, "say use_fsdp or use_deepspeed to the Trainer"),
        "ACCELERATE_MIXED_PRECISION": (
            asked.get("ACCELERATE_MIXED_PRECISION") == plan.mixed_precision,
            f"say mixed_precision to the Trainer, for which it is {plan.mixed_precision!r}",
        ),
        "ACCELERATE_DYNAMO_BACKEND": (plan.compile, "say compile=True to the Trainer"),
        "FSDP_OFFLOAD_PARAMS": (plan.strategy != "fsdp2", "use_fsdp offloads nothing"),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": (False, "give the file as use_deepspeed"),
    }
    for name, (does, cure) in agrees.items():
        value = asked.get(name, "")
        if value.lower() not in ("", "0", "no", "none", "false") and not does:
            raise CannotTrain(
                f"The environment sets {name} to {value!r} (`accelerate launch`, its config, or left over), which the "
                "Trainer does not do.",
                hint=f"Unset it, or {cure}.",
            )
