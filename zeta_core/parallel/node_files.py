"""Collecting the files of a checkpoint that the nodes of a run have written to their own folders.

They are sent to the first node, which has a complete checkpoint afterwards: its worker stores it as it stores that of
one host, and no common folder is needed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from zeta_core.parallel.processes import Processes
from zeta_core.system.file_hash import file_sha256

PIECE_BYTES = 16 * 2**20


def collect_files(folder: Path, processes: Processes, group: Any) -> None:
    """Copy the files in ``folder`` of every node to the ``folder`` of the first node, one node after the other.

    ``group`` is a process group of all ranks that exchanges CPU tensors; the first rank of each node calls this.
    Raises `OSError` if a file does not arrive intact or cannot be written.
    """
    if not processes.is_main:
        _send(folder, group)
        return
    for rank in processes.first_ranks[1:]:
        _receive(folder, rank, group)


def _send(folder: Path, group: Any) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = [(path.relative_to(folder).as_posix(), path.stat().st_size, file_sha256(path)) for path in files]
    header = json.dumps(listed).encode()
    dist.send(torch.tensor([len(header)]), 0, group=group)
    dist.send(_tensor(header), 0, group=group)
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                dist.send(_tensor(piece), 0, group=group)


def _receive(folder: Path, rank: int, group: Any) -> None:
    length = torch.zeros(1, dtype=torch.int64)
    dist.recv(length, rank, group=group)
    header = torch.empty(int(length.item()), dtype=torch.uint8)
    dist.recv(header, rank, group=group)
    for name, size, expected in json.loads(header.numpy().tobytes()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with path.open("xb") as file:  # names contain the rank, so no two nodes write the same file
            for start in range(0, size, PIECE_BYTES):
                piece = torch.empty(min(PIECE_BYTES, size - start), dtype=torch.uint8)
                dist.recv(piece, rank, group=group)
                content = piece.numpy().tobytes()
                digest.update(content)
                file.write(content)
        if digest.hexdigest() != expected:
            raise OSError(f"{name}, which rank {rank} sent, does not have the hash of the original file")


def _tensor(content: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
