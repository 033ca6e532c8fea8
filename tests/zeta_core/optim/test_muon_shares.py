"""Muon's work is divided among processes, and its results have the same bits on any number of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.zeta_core.parallel.test_parallel import environment

SCRIPT = Path(__file__).with_name("muon_script.py")


def run(folder: Path, processes: int) -> dict[str, list[int]]:
    """The operations of each rank, by strategy."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"operations-{processes}.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_share_the_matrices_and_get_the_bits_of_one_process(tmp_path: Path) -> None:
    alone = run(tmp_path, 1)
    expected = load_file(tmp_path / "ddp-1.safetensors")
    for processes in (2, 4):
        operations = run(tmp_path, processes)
        for strategy, (whole,) in alone.items():
            shares = operations[strategy]
            assert sum(shares) == whole, "each matrix is orthogonalized once"
            assert max(shares) < 1.5 * whole / processes, (strategy, shares)
            found = load_file(tmp_path / f"{strategy}-{processes}.safetensors")
            assert all(torch.equal(found[name], expected[name]) for name in expected), strategy
