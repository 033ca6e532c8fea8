"""Splitting the global batch into micro-batches that fit into memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from zeta_core.contract.spec import defaults
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.plan.plan import BatchSizeOrigin, PlanInputs

# Limits of a micro-batch on a CPU. There, the operating system kills a process that runs out of memory, instead of
# raising an error. These are small enough for any machine that can hold the model, and larger ones are not faster.
CPU_MICRO_BATCH_TOKENS = 8192
CPU_ACTIVATION_BYTES = 2 << 30


@dataclass(frozen=True)
class BatchSplit:
    """The global batch and its split. ``batch_size`` is the micro-batch; both count sequences."""

    batch_size: int
    gradient_accumulate_every: int
    global_batch: int
    origin: BatchSizeOrigin


def split_batch(
    options: TrainerOptions, inputs: PlanInputs, stored: dict[str, Any] | None, *, pack: bool
) -> BatchSplit:
    """The split of the global batch: as given, else as stored, else the default for the device and the data."""
    batch_size, accumulate = defaults.batch_split(options)
    world_size = inputs.world_size
    if stored is not None and world_size != first_world_size(stored):
        return _split_anew(stored, batch_size or stored["batch_size"], world_size)
    if batch_size is not None and accumulate is not None:
        return BatchSplit(batch_size, accumulate, batch_size * accumulate * world_size, "given")
    if stored is not None and accumulate is None:
        return BatchSplit(stored["batch_size"], stored["gradient_accumulate_every"], stored["global_batch"], "resumed")
    global_batch = _default_global_batch(inputs, pack=pack) if stored is None else int(stored["global_batch"])
    if accumulate is not None:
        batch_size = defaults.split_micro_batch(global_batch, accumulate, world_size)
        return BatchSplit(batch_size, accumulate, batch_size * accumulate * world_size, "given")
    share = global_batch // world_size
    batch_size = min(share, _sequences_in_memory(options, inputs, pack=pack) or share)
    origin: BatchSizeOrigin = "global_batch" if batch_size == share else "estimated_memory"
    batch_size = _largest_divisor(share, batch_size)
    return BatchSplit(batch_size, share // batch_size, share * world_size, origin)


def _split_anew(stored: dict[str, Any], batch_size: int, world_size: int) -> BatchSplit:
    """The split of the stored global batch for another number of processes than at the first start.

    The global batch need not be a multiple of the number of processes: in a micro-step, some of them then have one
    sequence less than the others.
    """
    global_batch = int(stored["global_batch"])
    share = math.ceil(global_batch / world_size)
    batch_size = min(batch_size, share)
    if global_batch % world_size == 0:  # equal micro-batches on all processes
        batch_size = _largest_divisor(share, batch_size)
    return BatchSplit(batch_size, math.ceil(share / batch_size), global_batch, "resumed")


def _largest_divisor(number: int, at_most: int) -> int:
    return next(divisor for divisor in range(at_most, 0, -1) if number % divisor == 0)


def _default_global_batch(inputs: PlanInputs, *, pack: bool) -> int:
    stats = inputs.stats_by_packing.get(pack)
    num_sequences = None if stats is None else stats.num_sequences
    return defaults.global_batch(num_sequences, inputs.world_size, from_scratch=inputs.from_scratch)


def first_world_size(stored: dict[str, Any]) -> int:
    return int(stored.get("first_world_size", stored["world_size"]))


def _sequences_in_memory(options: TrainerOptions, inputs: PlanInputs, *, pack: bool) -> int | None:
    """The number of the longest sequences that a micro-batch can have, at least 1; None if that is unknown."""
    seq_len = defaults.seq_len(options, inputs.positions or defaults.MAX_DEFAULT_SEQ_LEN) or 1
    length = inputs.stats_by_packing[pack].longest if pack in inputs.stats_by_packing else seq_len
    is_cpu = inputs.device == "cpu"
    tokens = min(CPU_MICRO_BATCH_TOKENS, _cpu_tokens(inputs)) if is_cpu else inputs.micro_batch_tokens
    return None if tokens is None else max(1, tokens // max(1, length))


def fits_on_cpu(inputs: PlanInputs, length: int) -> bool:
    """Whether one sequence of ``length`` tokens is within the CPU's limits for activations; always true on a GPU."""
    return inputs.device != "cpu" or length <= _cpu_tokens(inputs)


def _cpu_tokens(inputs: PlanInputs) -> int:
    """The tokens whose activations fit into `CPU_ACTIVATION_BYTES` and half of the free memory of the host."""
    bytes_per_token = 4 * max(1, inputs.values_per_token)
    return min(CPU_ACTIVATION_BYTES, inputs.free_bytes // 2 // inputs.world_size) // bytes_per_token
