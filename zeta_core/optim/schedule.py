"""The learning rate as a pure function of the number of applied updates: the same for any number of processes.

The loop evaluates it once per applied update. It is never passed to Accelerate, whose scheduler steps once per process
(accelerate #2318).
"""

from __future__ import annotations

import math

from zeta_core.contract.spec.options import Schedule

WSD_DECAY_SHARE = 0.2  # of the run, linear to zero (Hu et al. 2024, arXiv 2404.06395, use 0.1; Haegele et al. 0.2)


def warmup_updates(warmup_steps: float, total_steps: int) -> int:
    """The number of warm-up steps; a value below 1 is a share of the run. Never more than the run has."""
    steps = math.ceil(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)
    return min(steps, total_steps)


def rate(schedule: Schedule, updates: int, *, peak: float, lowest: float = 0.0, warmup: int, total_steps: int) -> float:
    """The learning rate of the next update: from 0 to ``peak`` in the warm-up, and then down to ``lowest``."""
    share = factor(schedule, updates, warmup=warmup, total_steps=total_steps)
    return peak * share if updates < warmup else lowest + (peak - lowest) * share


def factor(schedule: Schedule, updates: int, *, warmup: int, total_steps: int) -> float:
    """The factor of the peak rate for the next update, after ``updates`` have been applied.

    The rate rises linearly during the warm-up, and update number ``warmup`` has the full rate. Cosine, linear and WSD
    reach zero after ``total_steps`` updates, so the last update still has a small rate.
    """
    if updates < warmup:
        return (updates + 1) / warmup
    if schedule == "constant" or total_steps <= warmup:
        return 1.0 if updates < total_steps or schedule == "constant" else 0.0
    share = min(1.0, (updates - warmup) / (total_steps - warmup))
    if schedule == "linear":
        return 1.0 - share
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * share))
    decay = max(1, min(round(WSD_DECAY_SHARE * total_steps), total_steps - warmup))
    return min(1.0, max(0.0, (total_steps - updates) / decay))
