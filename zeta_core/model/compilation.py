"""``torch.compile`` for each repeated block: compiled once, used by all of them, within seconds instead of minutes.

Only a block's forward is compiled, on the object: names in the state dict stay, checkpoints are those of the model as
it is, and FSDP2's hooks and the recomputing of activations lie around it, so their random states are kept as without.
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
    """What this machine lacks to compile, in words, or ``None``; kernels of a GPU need it too, for their host code."""
    if compiler() is None:
        return "a C++ compiler (Debian: apt-get install g++; or name one in CXX)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python's headers (Debian: apt-get install python3-dev)"
    return None


@contextmanager
def compiled(blocks: list[nn.Module]) -> Generator[None]:
    """Within it the blocks' forwards are compiled, when they are first called. Raises `CannotTrain`."""
    lacking = missing_requirement()
    if lacking is not None:
        raise CannotTrain(f"compile is true, and this machine has not what it needs: {lacking}; or leave it out.")
    with replaced_forwards(blocks, lambda forward: cast(Any, torch.compile(forward))):
        yield
