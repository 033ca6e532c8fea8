"""What a job may say in ``use_deepspeed``: nothing that names a file, or makes DeepSpeed write to one."""

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


def stage_of(asked: bool | int | dict[str, Any] | None) -> Any:
    """The ZeRO stage that is asked for: `DEFAULT_STAGE` where only DeepSpeed is, ``None`` where it is not."""
    if isinstance(asked, dict):
        return (asked.get("zero_optimization") or {}).get("stage", DEFAULT_STAGE)
    return DEFAULT_STAGE if asked is True else asked or None


def cure_for_a_job(asked: bool | int | dict[str, Any] | str | None) -> str | None:
    """Why a job must not say this, with the cure; ``None`` where it may. A script of one's own may say anything."""
    if isinstance(asked, str):
        return "a job names no file; send the config itself as an object, or a ZeRO stage"
    if isinstance(asked, dict):
        unknown = sorted(asked.keys() - set(ALLOWED_KEYS))
        if unknown:
            return f"a job must not set {unknown[0]!r}; it may set {', '.join(ALLOWED_KEYS)}"
        zero = json.dumps(asked.get("zero_optimization", {}))
        if "nvme" in zero or "path" in zero:
            return "a job must not name a path to offload to; offload to 'cpu' or leave it out"
    return None
