"""Runs on several nodes: one run directory, output directory and cache per node, and loopback addresses as hosts."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from tests.harness.ports import free_loopback_port
from tests.zeta_core.run_directories import make_run, start

ADDRESSES = ["127.0.0.2", "127.0.0.3"]


def make_node_runs(
    folder: Path, attempt: int = 1, *, processes: int, addresses: list[str] | None = None, **fields: Any
) -> list[Path]:
    """Create the run directories of all nodes, ``<folder>/node-N/attempt-N``; ``processes`` are those of each node."""
    addresses = addresses or ADDRESSES
    port = free_loopback_port()
    return [
        make_run(
            folder / f"node-{node}",
            attempt,
            processes=processes,
            node_group={"node_rank": node, "addresses": addresses, "port": port},
            **fields,
        )
        for node in range(len(addresses))
    ]


def run_nodes(runs: list[Path], seconds: float = 250) -> list[int]:
    """Run all nodes to their end, and return their exit codes."""
    return [process.wait(timeout=seconds) for process in start_nodes(runs)]


def start_nodes(runs: list[Path]) -> list[subprocess.Popen[bytes]]:
    return [start(run) for run in runs]


def logs(runs: list[Path]) -> str:
    """The ends of the logs of all nodes, for the message of a failed assertion."""
    return "\n".join(f"--- {run}\n{(run / 'train.log').read_text()[-3000:]}" for run in runs)
