"""The precision of the weights in safetensors files, from the headers of the files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from zeta_core.checkpoint.row_file import DTYPE_NAMES

_FLOATING = {name: dtype for dtype, name in DTYPE_NAMES.items() if dtype.is_floating_point}
_INTEGERS = frozenset(DTYPE_NAMES.values()) - _FLOATING.keys()


def stored_precision(directory: Path) -> torch.dtype | None:
    """The type of all floating-point weights in a directory; None if there are several, or types such as fp8.

    None for a damaged file, too, which loading the model reports.
    """
    found: set[str] = set()
    for path in directory.glob("model*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError):
            return None
    floating = found - _INTEGERS
    return _FLOATING.get(floating.pop()) if len(floating) == 1 else None
