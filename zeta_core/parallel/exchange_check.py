"""Checks that the ranks of several nodes can exchange data, within seconds, before anything is loaded."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout  # pyright: ignore[reportPrivateUsage] - no other way

from zeta_core.parallel.process_group import GROUP_TIMEOUT, exchange_failed
from zeta_core.parallel.processes import Processes

NUM_ROUNDS = 5
SAMPLE_BYTES = 4 * 2**20


def check_exchange(processes: Processes) -> str:
    """Sum tensors over all ranks, and return the measured latency and bandwidth as a sentence. Raises `TrainingFailed`.

    The group was created with a short timeout, so a hanging exchange is an error; later ones get the usual timeout.
    """
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    try:
        latency = _fastest(torch.ones(1, device=device))
        seconds = _fastest(torch.ones(SAMPLE_BYTES // 4, device=device))
    except RuntimeError as error:
        raise exchange_failed(processes.num_nodes, error) from error
    _set_pg_timeout(GROUP_TIMEOUT)
    return (
        f"An all-reduce over {processes.world_size} processes on {processes.num_nodes} nodes takes "
        f"{latency * 1e3:.2f} ms, and {SAMPLE_BYTES / seconds / 1e6:,.0f} MB/s for {SAMPLE_BYTES // 2**20} MiB."
    )


def _fastest(values: torch.Tensor) -> float:
    """The seconds of the fastest of several sums of this tensor over all ranks."""
    found: list[float] = []
    for _ in range(NUM_ROUNDS):
        started = time.monotonic()
        dist.all_reduce(values)
        values[:1].tolist()  # waits for the device
        found.append(time.monotonic() - started)
    return min(found)
