"""Connecting the ranks of a run in torch's process group."""

from __future__ import annotations

import threading
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from zeta_core.environment import ProcessRank
from zeta_core.failures import CannotTrain, NodesUnreachable

EXCHANGE_SECONDS = 60.0  # for the first exchange between nodes
GROUP_TIMEOUT = timedelta(minutes=20)  # long enough for a slow rank, short enough to detect a hang


def connect(backend: str, rank: ProcessRank) -> None:
    """Create the process group. On several nodes, it has a short timeout until `check_exchange` has succeeded."""
    try:  # separate, because a failed initialization of a group keeps its number reserved
        store, number, world_size = next(rendezvous("env://", timeout=GROUP_TIMEOUT))
    except dist.DistError as error:
        raise CannotTrain(
            f"The {rank.world_size} processes could not connect at {rank.address} within "
            f"{GROUP_TIMEOUT.total_seconds() / 60:.0f} minutes ({str(error).splitlines()[0]:.200}).",
            hint="Start all of them with the same MASTER_ADDR and MASTER_PORT; for a single process, unset RANK and "
            "WORLD_SIZE.",
        ) from error
    store.set_timeout(GROUP_TIMEOUT)
    store = PrefixStore("default_pg", store)
    timeout = GROUP_TIMEOUT
    if rank.num_nodes > 1:
        _wait_for_all(store, world_size)
        timeout = timedelta(seconds=EXCHANGE_SECONDS)  # until `check_exchange` has succeeded
    try:
        dist.init_process_group(backend, store=store, rank=number, world_size=world_size, timeout=timeout)
    except RuntimeError as error:
        if rank.num_nodes == 1:
            raise
        raise exchange_failed(rank.num_nodes, error) from error


def _wait_for_all(store: Store, world_size: int) -> None:
    """Wait until all ranks have read their data, which may take hours on a node that has not tokenized it yet.

    Lost nodes are detected by the processes that started the ranks, so there is no timeout.
    """
    if store.add("started", 1) == world_size:
        store.set("all started", "-")
    pause = threading.Event()
    while not store.check(["all started"]):
        pause.wait(0.1)


def exchange_failed(num_nodes: int, error: RuntimeError) -> NodesUnreachable:
    """The error of a run whose nodes are connected, but whose process group does not work."""
    reason = str(error).partition("\n")[0][:300]
    return NodesUnreachable(
        f"The processes of the {num_nodes} nodes could not exchange data within {EXCHANGE_SECONDS:.0f} s ({reason})."
    )
