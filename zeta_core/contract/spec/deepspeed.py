"""The values of ``use_deepspeed`` that a job may have. None of them may make DeepSpeed read or write a file."""

from __future__ import annotations

import json
from typing import Any

ALLOWED_KEYS = (
    "zero_optimization",
    "bf16",
    "fp16",
    "gradient_clipping",
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "gradient_accumulation_steps",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
)
DEFAULT_STAGE = 2


def requested_zero_stage(use_deepspeed: bool | int | dict[str, Any] | str | None) -> Any:
    """The requested ZeRO stage, `DEFAULT_STAGE` if the value names none; ``None`` if DeepSpeed is not used.

    The path of a config file, which only a Trainer accepts, is returned as it is.
    """
    if isinstance(use_deepspeed, dict):
        return (use_deepspeed.get("zero_optimization") or {}).get("stage", DEFAULT_STAGE)
    return DEFAULT_STAGE if use_deepspeed is True else use_deepspeed or None


def fault_in_a_job(use_deepspeed: bool | int | dict[str, Any] | str | None) -> str | None:
    """The reason why a job can't have this value, with the fix; ``None`` if it can. A Trainer accepts any value."""
    if isinstance(use_deepspeed, str):
        return "a job can't refer to a file; send the config itself as an object, or a ZeRO stage"
    if isinstance(use_deepspeed, dict):
        unknown = sorted(use_deepspeed.keys() - set(ALLOWED_KEYS))
        if unknown:
            return f"a job can't set {unknown[0]!r}; the allowed keys are {', '.join(ALLOWED_KEYS)}"
        zero = json.dumps(use_deepspeed.get("zero_optimization", {}))
        if "nvme" in zero or "path" in zero:
            return "a job can't offload to a path; offload to 'cpu', or omit it"
    return None
