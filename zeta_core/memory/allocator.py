"""Memory of the C library while a CPU trains: what one step frees, the next one has again.

By default glibc maps large blocks anew for each tensor and gives them back when it is freed, so every step of a small
Llama (6.8 M parameters, 2,048 tokens) has the kernel clear 280,000 pages again; that was a fifth of its time. Here
freed memory stays with the process until the run ends. The price: its peak is up to a quarter higher, because blocks
of many sizes share one heap; so it is done only where memory is plenty (`memory.needs.has_plenty`). GPUs have torch's
own caching allocator, and other C libraries are left as they are.

A run that computes its activations again to save memory gets the opposite: what is freed is given back at once. glibc
raises the size from which it does so to 32 MB by itself, and then a forward whose tensors are 152 MB at most (the same
Llama, 8,192 tokens) leaves a heap of 502 MB, of which `malloc_trim` gives back all but 122; the whole step peaked at
1,030 MB beside the gradients, and at 288 MB with a fixed size, where its tensors are 299 MB.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Generator
from contextlib import contextmanager

# mallopt(3). After a run the thresholds are those that glibc's own adjustment, which ends for good where one of them is
# set, reaches at most: DEFAULT_MMAP_THRESHOLD_MAX, and twice that.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
NEVER_TRIM, NO_MAPPINGS = -1, 0
GIVEN_BACK_FROM = 1 << 20  # bytes of a block
USUAL = ((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20))


@contextmanager
def keeping_freed_memory() -> Generator[None]:
    """Within it freed memory is kept for the next use; afterwards it is given back."""
    with _set((M_MMAP_MAX, NO_MAPPINGS), (M_TRIM_THRESHOLD, NEVER_TRIM)):
        yield


@contextmanager
def giving_freed_memory_back() -> Generator[None]:
    """Within it the memory of a large block is the system's again as soon as it is freed."""
    with _set((M_MMAP_THRESHOLD, GIVEN_BACK_FROM), (M_TRIM_THRESHOLD, GIVEN_BACK_FROM)):
        yield


@contextmanager
def _set(*parameters: tuple[int, int]) -> Generator[None]:
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    library.malloc_trim(0)  # what is free already would be used again
    for parameter, value in parameters:
        library.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in USUAL:
            library.mallopt(parameter, value)
        library.malloc_trim(0)
