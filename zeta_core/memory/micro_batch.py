"""The number of tokens that a micro-batch can have on a GPU, from the estimated memory of two sizes."""

from __future__ import annotations

from dataclasses import replace

import torch

from zeta_core.memory.estimate import PreparedModel, estimate_run
from zeta_core.memory.zero_parts import ZeroSettings
from zeta_core.objective.isolation import Isolation
from zeta_core.plan import Plan

USED_SHARE = 0.85  # of a GPU's memory; the rest is for temporary buffers, fragmentation and the CUDA context

LINEAR_FROM_TOKENS = 8192  # with fewer tokens, the loss may not be computed in chunks


def gpu_memory_bytes() -> int | None:
    """The memory of this process's GPU, or None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def micro_batch_tokens(
    build: PreparedModel,
    plan: Plan,
    length: int,
    capacity: int,
    *,
    isolation: Isolation | None = None,
    zero: ZeroSettings | None = None,
) -> int | None:
    """The tokens of sequences of ``length`` tokens that fit into ``capacity`` bytes; at least one sequence.

    None if the memory of the model can't be estimated.
    """

    def total(number: int) -> int | None:
        sized = replace(plan, batch_size=number, seq_len=length)
        try:
            return estimate_run(build, sized, on_gpu=True, isolation=isolation, zero=zero).total
        except Exception:  # noqa: BLE001 - a module that can't be copied without storage raises anything
            return None

    limit = USED_SHARE * capacity
    few = max(1, LINEAR_FROM_TOKENS // length)
    some, twice = total(few), total(2 * few)
    if some is None or twice is None:
        return None
    number = few + int((limit - some) // max(1, (twice - some) // few))
    if number < few and (one := total(1)) is not None:
        number = 1 + int((limit - one) // max(1, (some - one) // max(1, few - 1)))
    elif number > few and (tried := total(number)) is not None and tried > limit:
        # Another part of the passes has the peak of larger micro-batches, so the memory grows faster from there.
        number = few + int((limit - some) * (number - few) // (tried - some))
    return length * max(1, number)
