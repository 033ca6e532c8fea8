"""``torch.compile`` for each repeated block: one compilation serves all blocks, and takes seconds instead of minutes.

Only the ``forward`` of each block instance is compiled, so the names in the state dict and the checkpoints do not
change. FSDP2's hooks and activation checkpointing wrap the compiled function, so they handle random states as usual.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zeta_core.environment import compiler
from zeta_core.failures import CannotTrain
from zeta_core.model.activation_checkpointing import replaced_forwards


def missing_requirement() -> str | None:
    """A description of what this machine lacks for compilation, or ``None``. GPU kernels need it, too."""
    if compiler() is None:
        return "a C++ compiler (Debian: apt-get install g++; or name one in CXX)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python's headers (Debian: apt-get install python3-dev)"
    return None


@contextmanager
def compiled(blocks: list[nn.Module]) -> Generator[None]:
    """Compile the blocks' forwards within the context, each when it is first called. Raises `CannotTrain`."""
    missing = missing_requirement()
    if missing is not None:
        raise CannotTrain(f"compile is true, but this machine lacks {missing}; install it, or remove compile.")
    with replaced_forwards(blocks, lambda forward: cast(Any, torch.compile(forward))):
        yield
