"""Tuning the C library's allocator for training on a CPU: each step reuses the memory that the previous one freed.

By default, glibc maps a new block for each large tensor and unmaps it when the tensor is freed. In every step of a
small Llama (6.8 M parameters, 2,048 tokens), the kernel therefore had to clear 280,000 pages, which took a fifth of the
time. Here, the process keeps freed memory until the run ends. Its peak is up to a quarter higher, because blocks of
many sizes share one heap, so this is only done if memory is plentiful (`estimate.has_plenty_of_memory`). GPUs use
torch's own caching allocator, and other C libraries are not changed.

With activation checkpointing, which saves memory, the opposite is done: freed memory is returned at once. By itself,
glibc raises the minimum size of such blocks to 32 MB. A forward pass whose tensors take at most 152 MB (the same Llama,
8,192 tokens) then leaves a heap of 502 MB, which `malloc_trim` reduces to 122 MB. The peak of the whole step,
without gradients, was 1,030 MB, and 288 MB with a fixed minimum size; the tensors take 299 MB.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Generator
from contextlib import contextmanager

# See mallopt(3). Setting a threshold permanently disables glibc's own adjustment. After a run, the thresholds are
# therefore set to the maximum of that adjustment: DEFAULT_MMAP_THRESHOLD_MAX, and twice that.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
NEVER_TRIM, NO_MAPPINGS = -1, 0
GIVEN_BACK_FROM = 1 << 20  # minimum size of a block in bytes
USUAL = ((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20))


@contextmanager
def keeping_freed_memory() -> Generator[None]:
    """Within the context, freed memory is kept for reuse; afterwards, it is returned to the system."""
    with _set((M_MMAP_MAX, NO_MAPPINGS), (M_TRIM_THRESHOLD, NEVER_TRIM)):
        yield


@contextmanager
def giving_freed_memory_back() -> Generator[None]:
    """Within the context, the memory of a large block is returned to the system as soon as it is freed."""
    with _set((M_MMAP_THRESHOLD, GIVEN_BACK_FROM), (M_TRIM_THRESHOLD, GIVEN_BACK_FROM)):
        yield


_entered: list[tuple[tuple[int, int], ...]] = []  # the parameters of the contexts that are active, outermost first


@contextmanager
def _set(*parameters: tuple[int, int]) -> Generator[None]:
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    library.malloc_trim(0)  # otherwise, the memory that is already free would be reused
    _entered.append((*USUAL, *parameters))
    _apply(library, _entered[-1])
    try:
        yield
    finally:
        _entered.pop()
        _apply(library, _entered[-1] if _entered else USUAL)
        library.malloc_trim(0)


def _apply(library: ctypes.CDLL, parameters: tuple[tuple[int, int], ...]) -> None:
    for parameter, value in parameters:
        library.mallopt(parameter, value)
