"""Importing what runs need into a process that will fork them, and detecting that the imported code has changed.

Guarantees: `preload` uses no device and starts no thread of Python and no process. It imports modules and fills caches
of pure functions; it reads no random numbers that a run depends on, because a run sets its seeds itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zeta_core.environment import variables
from zeta_core.system.settings import process_environment

# Imported by `zeta_core.process.launch` and by a run on its usual path.
_MODULES = (
    "zeta_core.run",
    "zeta_core.data.sources",
    "torch.distributed.launcher.api",
    "torch.distributed.elastic.multiprocessing.errors",
    "pyarrow",
)
_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma3")


class UnsafeToFork(Exception):
    """Why this process must not fork runs, in one sentence."""


def preload() -> dict[str, str]:
    """Import the libraries, and return the environment variables that the imports set.

    Raises `UnsafeToFork` if they did more than that.
    """
    before = process_environment()
    for name in _MODULES:
        importlib.import_module(name)
    for name in _ARCHITECTURES:
        _import_if_present(f"transformers.models.{name}.modeling_{name}")
    _import_if_present("peft")
    # Accelerate imports DeepSpeed in every run. Its accelerator is chosen once, so runs that use it start cold.
    with variables(DS_ACCELERATOR="cpu"):
        _import_if_present("deepspeed")
    _fill_caches()
    _require_forkable()
    return {name: value for name, value in process_environment().items() if before.get(name) != value}


def _import_if_present(name: str) -> None:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return
    try:
        importlib.import_module(name)
    except ImportError:
        return  # another version, or a broken optional package; a run that needs it reports that


def _fill_caches() -> None:
    """Compile the patterns of transformers for renaming weights, which takes half a second."""
    try:
        get_mapping: Callable[[str], object] = importlib.import_module(
            "transformers.conversion_mapping"
        ).get_checkpoint_conversion_mapping
    except (ImportError, AttributeError):
        return  # another version
    get_mapping("llama")


def _require_forkable() -> None:
    import torch

    if torch.cuda.is_initialized():
        raise UnsafeToFork("importing the libraries initialized CUDA, which doesn't work after a fork")
    if devices := [name for name in map(_target, Path("/proc/self/fd").iterdir()) if name.startswith("/dev/nvidia")]:
        raise UnsafeToFork(f"importing the libraries opened {devices[0]}, which must not be shared by a fork")
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
        raise UnsafeToFork(f"importing the libraries started threads ({names})")
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        pass
    else:
        raise UnsafeToFork("importing the libraries started a process")


def _target(descriptor: Path) -> str:
    try:
        return os.readlink(descriptor)
    except OSError:
        return ""


class CodeFingerprint:
    """The files of the imported modules, and the folders that modules are imported from.

    Create it before the imports, and call `record` after them.
    """

    def __init__(self) -> None:
        self._started_ns = time.time_ns()
        self._stamps = {path: _stamp(path) for path in sys.path if path and os.path.isdir(path)}

    def record(self) -> None:
        files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        self._stamps |= {file: _stamp(file) for file in files if file and os.path.isfile(file) and os.path.isabs(file)}

    def change(self) -> str | None:
        """A path that was changed, replaced or removed since the imports began; ``None`` if there is none."""
        for path, stamp in self._stamps.items():
            if stamp is None or stamp != _stamp(path) or (stamp.mtime_ns > self._started_ns and stamp.is_file):
                return path
        return None


@dataclass(frozen=True)
class _Stamp:
    """Not the time of the last change of the inode, which another hard link to the file changes, too."""

    inode: int
    size: int
    mtime_ns: int
    is_file: bool


def _stamp(path: str) -> _Stamp | None:
    """``None`` if there is no such file or folder."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return _Stamp(status.st_ino, status.st_size, status.st_mtime_ns, stat.S_ISREG(status.st_mode))
