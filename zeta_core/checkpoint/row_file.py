"""A safetensors file that several processes write together, each its own rows of every tensor.

All processes know the names, types and shapes, so they compute the same layout. One of them creates the file with its
header and its full size; each then writes its rows at their offsets. No process holds more than its own rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

# The names of types in safetensors files.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Rows:
    """The rows of a tensor that a process holds, from row ``first``, and the shape of the whole tensor.

    ``values`` is None if other processes hold all rows.
    """

    first: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor | None

    def converted(self, dtype: torch.dtype | None) -> torch.dtype:
        """The type in the file, in which floating-point tensors have ``dtype`` unless that is None."""
        return dtype if dtype is not None and self.dtype.is_floating_point else self.dtype


def create_row_file(path: Path, rows: Mapping[str, Rows], dtype: torch.dtype | None) -> None:
    """Create the file with its header and its full size."""
    header, _, size = _layout(rows, dtype)
    with path.open("xb") as file:
        file.write(header)
        file.truncate(size)


def write_rows(path: Path, rows: Mapping[str, Rows], dtype: torch.dtype | None) -> None:
    """Write the rows of this process into a file that `create_row_file` created."""
    _, offsets, _ = _layout(rows, dtype)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for name, part in rows.items():
            if part.values is None or not part.values.numel():
                continue
            values = part.values.to(part.converted(dtype)).contiguous()
            row_bytes = values.nbytes // max(1, values.shape[0]) if values.dim() else 0
            _write_all(descriptor, values, offsets[name] + part.first * row_bytes)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, values: torch.Tensor, offset: int) -> None:
    content = memoryview(cast(Any, values.reshape(-1).view(torch.uint8).numpy()))
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _layout(rows: Mapping[str, Rows], dtype: torch.dtype | None) -> tuple[bytes, dict[str, int], int]:
    """The header, the offset of each tensor in the file, and the size of the file; wider types come first."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(rows, key=lambda name: (-rows[name].converted(dtype).itemsize, name)):
        kind, shape = rows[name].converted(dtype), rows[name].shape
        starts[name] = end
        end += kind.itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": DTYPE_NAMES[kind], "shape": list(shape), "data_offsets": [starts[name], end]}
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # tensors are aligned to 8 bytes
    header = len(content).to_bytes(8, "little") + content
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + end
