"""On a CPU, freed memory is kept during training, or returned immediately; measured in a separate process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CHILD = """
import resource
from pathlib import Path
from zeta_core.system.allocator import giving_freed_memory_back, keeping_freed_memory

SIZE = 64 << 20
PAGES = SIZE // resource.getpagesize()

def faults(size=SIZE):
    pages = size // resource.getpagesize()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(size)
    block[:: resource.getpagesize()] = b"x" * pages
    del block
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / pages

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) / PAGES

faults()
usual = faults()
before = resident()
with keeping_freed_memory():
    faults()
    kept = faults()
    within = resident()
after = resident()
faults(SIZE >> 3)
with giving_freed_memory_back():
    again = faults(SIZE >> 3)
print(usual > 0.9, kept < 0.1, within - before > 0.9, after - before < 0.1, again > 0.9)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the allocator of glibc is tuned")
def test_freed_memory_is_kept_inside_the_block_and_returned_after_it() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["True"] * 5
