"""What a training changes in the process that it runs in, put back when it is over."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from zeta_core.checkpoint import state as states


@contextmanager
def as_it_was() -> Generator[None]:
    """What a training changes in its process, and a script or a notebook goes on with, is put back afterwards."""
    random_state, threads = states.random_state(), torch.get_num_threads()
    try:
        with torch.enable_grad():
            yield
    finally:
        states.restore_random(random_state)
        torch.set_num_threads(threads)


@contextmanager
def deterministic_kernels() -> Generator[None]:
    """The same seed gives the same bits on a GPU, too; a kernel that cannot is warned of by torch, not refused."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
