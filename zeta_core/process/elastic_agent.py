"""Starting the ranks of this node with torch elastic, and waiting for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous_registry

from zeta_core.contract.wire.node_group import NodeGroup
from zeta_core.environment import variables

RENDEZVOUS_SECONDS = 300


class _Agent(LocalElasticAgent):
    def _exit_barrier(self) -> None:
        """Don't wait for the other nodes: `NodeLink.exchange_ends` does, and also when ranks have failed."""


def run_ranks(
    command: Sequence[str], *, num_processes: int, run_id: str, group: NodeGroup | None
) -> dict[int, ProcessFailure]:
    """Run ``command`` in each rank of this node until all have exited or one has failed; returns failures by rank.

    Nothing is restarted, because the worker retries whole attempts. With several nodes, ranks follow the order of the
    group; torch's dynamic rendezvous would assign them in the order of arrival, which changes the results.
    """
    num_nodes = 1 if group is None else group.num_nodes
    options: dict[str, Any] = {} if group is None else {"rank": group.node_rank}
    parameters = RendezvousParameters(
        backend="c10d" if group is None else "static",
        endpoint="localhost:0" if group is None else group.rendezvous,
        run_id=run_id,
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        local_addr=None if group is None else group.address,
        timeout=RENDEZVOUS_SECONDS,
        **options,
    )
    spec = WorkerSpec(
        role="default",
        local_world_size=num_processes,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=rendezvous_registry.get_rendezvous_handler(parameters),
        max_restarts=0,
        master_addr=None if group is None else group.addresses[0],
        master_port=None if group is None else group.port,
        local_addr=None if group is None else group.address,
    )
    agent = _Agent(spec, DefaultLogsSpecs())
    try:
        # SIGTERM is converted to the stop file, which lets the ranks save; elastic would end them.
        with variables(TORCHELASTIC_SIGNALS_TO_HANDLE="SIGINT,SIGHUP,SIGQUIT"):
            return cast(RunResult, agent.run()).failures
    finally:
        spec.rdzv_handler.shutdown()
