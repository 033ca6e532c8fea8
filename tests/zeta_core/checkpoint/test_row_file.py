"""A safetensors file that several processes write together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zeta_core.checkpoint.row_file import Rows, create_row_file, write_rows

WHOLE = {
    "matrix": torch.randn(5, 3),
    "half": torch.randn(4, 2, 2).bfloat16(),
    "number": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
}


def rows_of(rank: int, world_size: int) -> dict[str, Rows]:
    """What a rank holds if each tensor is split as FSDP2 does; the first rank holds numbers."""
    held: dict[str, Rows] = {}
    for name, tensor in WHOLE.items():
        if not tensor.dim():
            held[name] = Rows(0, (), tensor.dtype, tensor if rank == 0 else None)
            continue
        chunk = -(-tensor.shape[0] // world_size)
        first = min(rank * chunk, tensor.shape[0])
        held[name] = Rows(first, tuple(tensor.shape), tensor.dtype, tensor[first : first + chunk])
    return held


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_file_has_the_rows_of_all_processes(tmp_path: Path, world_size: int, dtype: torch.dtype | None) -> None:
    path = tmp_path / "weights.safetensors"
    create_row_file(path, rows_of(0, world_size), dtype)
    for rank in reversed(range(world_size)):
        write_rows(path, rows_of(rank, world_size), dtype)
    found = load_file(path)
    assert found.keys() == WHOLE.keys()
    for name, tensor in WHOLE.items():
        expected = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0)
