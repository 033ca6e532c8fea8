"""The connection between the nodes of a run: which have joined, which have stopped responding, and how each ended.

It connects the launchers, the processes that start the ranks of their nodes, through torch's TCP store on node 0, which
torch elastic and the ranks use as well. A thread of each node sends heartbeats to the store; node 0 reads those of all
nodes, and the others read that of node 0. A node that is silent for `SILENT_SECONDS` is lost: its launcher exited, or
its host was suspended or cut off. Every other node is notified and ends its ranks, which would otherwise wait in a
collective operation until its timeout. Only time in which this process ran counts, so a host that was suspended does
not consider the others lost when it resumes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from zeta_core.contract.job.events import StatusLine
from zeta_core.contract.wire.node_group import NodeGroup
from zeta_core.failures import NodesUnreachable
from zeta_core.process.network_check import Connection, Responder, check_connections, describe

JOIN_SECONDS = 120.0  # from the start of the first node to that of the last one
CHECK_SECONDS = 60.0  # for the network check of all nodes
SILENT_SECONDS = 30.0
END_SECONDS = 30.0  # from the end of the first node's ranks to that of the last one's
BEAT_SECONDS = 1.0
CONNECT_SECONDS = 2.0  # for one try to connect; signals are handled between two tries
POLL_SECONDS = 0.05


class NodeLink:
    """One node's end of the connection. `connect` comes first, and `close` last."""

    def __init__(self, group: NodeGroup, run_id: str) -> None:
        """``run_id`` names this attempt; nodes of another attempt that use the same port are ignored."""
        self._group = group
        self._run_id = run_id
        self._store: Store | None = None
        self._closed = threading.Event()
        self._declared = threading.Lock()
        self.lost: int | None = None  # the node that stopped responding

    # --- before the ranks start ---

    def connect(self) -> None:
        """Wait for all nodes. Raises `NodesUnreachable` with the missing ones."""
        group = self._group
        deadline = time.monotonic() + JOIN_SECONDS
        while self._store is None:
            try:
                self._store = self._connected(is_server=group.node_rank == 0)
            except DistError as error:
                if group.node_rank == 0 or time.monotonic() > deadline:
                    raise self._not_connected(error) from error
                self._closed.wait(POLL_SECONDS)
        self._gather("joined", "-", JOIN_SECONDS)

    def check_network(self) -> str:
        """Connect every node to every other one; returns the measurements. Raises `NodesUnreachable` with the pairs."""
        group, token = self._group, f"zeta-network-check:{self._run_id}"[:200].encode()
        responder = Responder(group.address, token)
        try:
            ports = [int(port) for port in self._gather("port", str(responder.port), CHECK_SECONDS)]
            own = check_connections(group, ports, token)
            texts = "\n".join(connection.model_dump_json() for connection in own)
            found = self._gather("connections", texts, CHECK_SECONDS)
        finally:
            responder.close()
        return describe(group, [Connection.model_validate_json(line) for text in found for line in text.splitlines()])

    def _connected(self, *, is_server: bool = False) -> Store:
        group = self._group
        # A server is shared with torch elastic, which connects to the same address and port in this process.
        store = TCPStore(
            group.addresses[0],
            group.port,
            is_master=is_server,
            timeout=timedelta(seconds=CONNECT_SECONDS),
            wait_for_workers=False,
            multi_tenant=is_server,
        )
        return PrefixStore(f"{self._run_id}/nodes", store)

    def _not_connected(self, error: DistError) -> NodesUnreachable:
        group = self._group
        reason = str(error).partition("\n")[0][:200]
        if group.node_rank == 0:
            return NodesUnreachable(
                f"{group.title(0)} cannot listen on port {group.port} ({reason}).",
                hint="Set ZETA_PORTS on its worker to ports that no other program uses.",
            )
        return NodesUnreachable(
            f"{group.title(group.node_rank)} could not connect to {group.name(0)} at port {group.port} within "
            f"{JOIN_SECONDS:.0f} s ({reason})."
        )

    def _gather(self, name: str, value: str, seconds: float) -> list[bytes]:
        """The values of all nodes, by node rank. Raises `NodesUnreachable` with those that sent none in time."""
        store, group = self._store, self._group
        assert store is not None, "connect comes first"
        keys = [f"{name}/{node}" for node in range(group.num_nodes)]
        store.set(keys[group.node_rank], value)
        deadline = time.monotonic() + seconds
        while not store.check(keys):
            if time.monotonic() > deadline:
                missing = [node for node, key in enumerate(keys) if not store.check([key])]
                raise NodesUnreachable(
                    f"{', '.join(map(group.name, missing))} did not join the other nodes within {seconds:.0f} s.",
                    hint="See the logs of these workers.",
                )
            self._closed.wait(POLL_SECONDS)
        return [bytes(value) for value in store.multi_get(keys)]

    # --- while the ranks run ---

    def watch(self, on_loss: Callable[[], None]) -> None:
        """Send heartbeats from now on, and call ``on_loss`` in a thread if another node is lost."""
        watched = range(1, self._group.num_nodes) if self._group.node_rank == 0 else range(1)
        heard = _Heard(watched)
        threading.Thread(target=self._beat, args=(heard, on_loss), name="node-beat", daemon=True).start()
        threading.Thread(target=self._observe, args=(heard, on_loss), name="node-watch", daemon=True).start()

    def _beat(self, heard: _Heard, on_loss: Callable[[], None]) -> None:
        """Exchange heartbeats. A call blocks if node 0 is suspended, so `_observe` has a thread of its own."""
        own, store, count = self._group.node_rank, None, 0
        while not self._closed.wait(BEAT_SECONDS):
            count += 1
            try:
                store = self._connected() if store is None else store
                store.set(f"beat/{own}", str(count))
                for node in heard.nodes:
                    if store.check([f"beat/{node}"]):
                        heard.record(node, bytes(store.get(f"beat/{node}")))
                if own != 0 and store.check(["lost"]):
                    self._declare(int(store.get("lost")), on_loss)
                elif own == 0 and self.lost is not None:
                    store.set("lost", str(self.lost))
            except DistError:
                store = None

    def _observe(self, heard: _Heard, on_loss: Callable[[], None]) -> None:
        before = time.monotonic()
        while not self._closed.wait(BEAT_SECONDS):
            now = time.monotonic()
            heard.advance(min(now - before, 2 * BEAT_SECONDS))
            before = now
            for node in heard.silent(SILENT_SECONDS):
                self._declare(node, on_loss)

    def _declare(self, node: int, on_loss: Callable[[], None]) -> None:
        with self._declared:
            if self.lost is not None or self._closed.is_set():
                return
            self.lost = node
        on_loss()

    # --- after the ranks have ended ---

    def exchange_ends(self, line: StatusLine) -> dict[int, StatusLine]:
        """Send how this node's ranks ended, and return the lines of all nodes that respond, this one included.

        The texts of the lines name their nodes.
        """
        ends = {self._group.node_rank: line}
        if self.lost == 0:
            return ends  # the store is on that node
        # In a thread, because a call blocks if node 0 is suspended.
        thread = threading.Thread(target=self._exchange_ends, args=(ends,), name="node-ends", daemon=True)
        thread.start()
        thread.join(2 * END_SECONDS)
        return {node: self._from_node(node, end) for node, end in sorted(ends.items())}

    def _exchange_ends(self, ends: dict[int, StatusLine]) -> None:
        own, count = self._group.node_rank, self._group.num_nodes
        try:
            store = self._connected()
            store.set(f"end/{own}", ends[own].model_dump_json(exclude_none=True))
            deadline = time.monotonic() + END_SECONDS
            while len(ends) < count and time.monotonic() < deadline:
                for node in range(count):
                    if node not in ends and node != self.lost and store.check([f"end/{node}"]):
                        ends[node] = StatusLine.model_validate_json(bytes(store.get(f"end/{node}")))
                if self.lost is not None and len(ends) == count - 1:
                    break
                self._closed.wait(POLL_SECONDS)
            # Node 0 stays until the others have read everything, because its exit closes the store.
            read = [f"read/{node}" for node in ends if node not in (0, self.lost)]
            if own != 0:
                store.set(f"read/{own}", "-")
            while own == 0 and not store.check(read) and time.monotonic() < deadline:
                self._closed.wait(POLL_SECONDS)
        except DistError:
            return  # node 0 has exited, or is unreachable

    def _from_node(self, node: int, end: StatusLine) -> StatusLine:
        if end.error is None:
            return end
        evidence = end.error.evidence.model_copy(update={"node": node})
        message = f"{self._group.title(node)}: {end.error.message}"
        error = end.error.model_copy(update={"message": message, "evidence": evidence})
        return end.model_copy(update={"message": message, "error": error})

    def close(self) -> None:
        self._closed.set()


class _Heard:
    """For how long each watched node has been silent, in seconds in which this process ran."""

    def __init__(self, nodes: range) -> None:
        self.nodes = nodes
        self._silent_seconds = dict.fromkeys(nodes, 0.0)
        self._newest: dict[int, bytes] = {}

    def record(self, node: int, beat: bytes) -> None:
        if self._newest.get(node) != beat:
            self._newest[node] = beat
            self._silent_seconds[node] = 0.0

    def advance(self, seconds: float) -> None:
        for node in self.nodes:
            self._silent_seconds[node] += seconds

    def silent(self, limit: float) -> list[int]:
        return [node for node in self.nodes if self._silent_seconds[node] >= limit]
