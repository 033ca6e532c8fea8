"""What a training holds in memory, by part: one table for what is said before it, at its start and of its first step.

Sources: weights, gradients and AdamW's two moments take 4 bytes each for every trained value, 16 in all (Rajbhandari et
al. 2019, ZeRO, arXiv 1910.02054, section 3.1; there in mixed precision, here everything in float32), and the stages of
ZeRO, of which FSDP2 does the third, share them out over the processes (section 5).
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from zeta_core.contract.spec.options import Optimizer

FLOAT32_BYTES = 4  # of a trained weight, of its gradient, and of each value that an optimizer keeps for it
# Values that an optimizer keeps for each trained one, at least: two moments, or one. Muon keeps two beside its
# matrices, and adafactor the factors of a matrix, which come to little; where the shapes are known, they are counted.
STATE_VALUES: dict[Optimizer, int] = {"adamw": 2, "sgd": 1, "lion": 1, "muon": 1, "adafactor": 0}
FSDP_STAGE = 3  # of ZeRO, that does what `use_fsdp` does


class MemoryParts(BaseModel):
    """Bytes of one process. ``activations`` are what a micro-batch leaves for its gradient; null where nobody knows.

    Not in it: what libraries hold themselves, and what an allocator loses between its blocks.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    weights: int
    gradients: int
    optimizer: int
    activations: int | None = None


def memory_parts(*, weights: int, num_trained: int, optimizer: int, stage: int, num_processes: int) -> MemoryParts:
    """The parts of each of the processes that share out what ``stage`` of ZeRO (0: nothing) shares out.

    ``weights`` and ``optimizer`` are the bytes of the whole model and of the whole state.
    """
    return MemoryParts(
        weights=weights // (num_processes if stage >= 3 else 1),
        gradients=FLOAT32_BYTES * num_trained // (num_processes if stage >= 2 else 1),
        optimizer=optimizer // (num_processes if stage >= 1 else 1),
    )


def least_state_bytes(optimizer: Optimizer, num_trained: int) -> int:
    """What the whole optimizer keeps from one update to the next, at least."""
    return FLOAT32_BYTES * STATE_VALUES[optimizer] * num_trained
