"""A device type whose tensors have no storage, so that code for GPUs can be run on a host without one.

Torch distinguishes its tensors from those of the host, as it does on a GPU: operations that mix both fail. Registering
the device type changes torch for the rest of the process, so call `fake_gpu` only in a process of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.backend_registration import (
    _DummyBackendModule,  # pyright: ignore[reportPrivateUsage]
    _setup_privateuseone_for_python_backend,  # pyright: ignore[reportPrivateUsage] - the interface for Python backends
)

NAME = "fakegpu"


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> _Event:
        return self

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> _Event:
        return _Event()


class _Backend(_DummyBackendModule):
    """The functions of a device module that FSDP2 calls. Nothing is asynchronous."""

    Stream, Event = _Stream, _Event

    def current_stream(self, *_: Any) -> _Stream:
        return _Stream()

    def stream(self, stream: _Stream) -> AbstractContextManager[None]:
        return nullcontext()

    def set_device(self, device: Any) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.zeros(8, dtype=torch.uint8)

    def set_rng_state(self, *_: Any) -> None: ...


def fake_gpu() -> torch.device:
    """Register the device type, once per process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    return torch.device(NAME, 0)
