"""Copying a run's tensors to memory quickly, concurrently with the next optimizer step where possible."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from zeta_core.failures import InvalidModel

Tensors = dict[str, torch.Tensor]
Bytes = NDArray[np.uint8]

_PIECE_BYTES = 8 << 20  # small enough for the two threads that copy to finish at about the same time


class Staging:
    """Copies tensors into its own buffers, which are reused from one checkpoint to the next.

    Training does not wait for copies that can run concurrently. `copy_later` queues tensors that only an update changes
    (parameters and the optimizer's tensors). The thread that writes the checkpoint copies them during the next step's
    forward and backward passes. Before the update, the training loop calls `finish` too, to copy part of the
    rest; it returns when everything is copied. If a queued tensor was written to in between, `finish` raises an error,
    and that save is not published (writes through ``tensor.data`` are not detected).
    """

    def __init__(self) -> None:
        self._buffers: Tensors = {}
        self._pieces: deque[tuple[Bytes, Bytes]] = deque()  # target, source
        self._unfinished = 0  # pieces that are queued or being copied
        self._queued: list[tuple[str, torch.Tensor, int]] = []
        self._changed: str | None = None
        self._copied = threading.Condition()
        self._stop_reserving = threading.Event()

    def copy(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Copy now; copies from a GPU are complete after `torch.cuda.synchronize`."""
        copies: Tensors = {}
        for name, tensor in tensors.items():
            source = tensor.detach()
            copies[name] = self._buffer(f"{prefix}{name}", source).copy_(source, non_blocking=True)
        return copies

    def copy_later(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Buffers that contain the tensors' current values after `finish` has returned.

        The tensors must not change before that. Tensors that are not contiguous CPU memory are copied now: for a GPU,
        the copy takes no longer than waiting for it would.
        """
        copies: Tensors = {}
        for name, tensor in tensors.items():
            source = tensor.detach()
            if source.device.type != "cpu" or not source.is_contiguous() or not source.nbytes:
                copies |= self.copy(prefix, {name: source})
                continue
            copies[name] = self._buffer(f"{prefix}{name}", source)
            target, source_bytes = _as_bytes(copies[name]), _as_bytes(source)
            pieces = [
                (target[start : start + _PIECE_BYTES], source_bytes[start : start + _PIECE_BYTES])
                for start in range(0, len(source_bytes), _PIECE_BYTES)
            ]
            self._unfinished += len(pieces)
            self._pieces.extend(pieces)
            self._queued.append((name, source, times_written(source)))
        return copies

    def finish(self) -> None:
        """Copy queued pieces together with other threads, until all are copied. Raises `InvalidModel`.

        numpy copies without torch's threads, which are busy, and without holding the interpreter's lock.
        """
        while True:
            try:
                target, source = self._pieces.popleft()
            except IndexError:
                break
            np.copyto(target, source)
            with self._copied:
                self._unfinished -= 1
                if not self._unfinished:
                    changed = [name for name, source, version in self._queued if times_written(source) != version]
                    self._changed = changed[0] if changed else None
                    self._queued.clear()
                    self._copied.notify_all()
        with self._copied:
            self._copied.wait_for(lambda: not self._unfinished)
        if self._changed is not None:
            raise InvalidModel(
                f"The model changed its parameter {self._changed} outside the optimizer's update, while it was being "
                "saved; make it a buffer, or let only the optimizer change it."
            )

    def reserve(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Allocate the buffers and touch their memory in advance, which is the slowest part of the first copy.

        Runs in a thread concurrently with training, until `stop_reserving` is called.
        """
        for name, tensor in tensors.items():
            if self._stop_reserving.is_set():
                return
            _as_bytes(self._buffer(f"{prefix}{name}", tensor.detach())).fill(0)

    def stop_reserving(self) -> None:
        """End `reserve`; the remaining buffers are allocated when they are first used."""
        self._stop_reserving.set()

    def _buffer(self, key: str, like: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            if like.device.type == "cpu" and like.nbytes >= _PIECE_BYTES:
                # numpy requests huge pages, which are touched twice as fast
                memory = np.empty(like.nbytes, dtype=np.uint8)
                buffer = torch.from_numpy(memory).view(like.dtype).view(like.shape)
            else:
                buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
            self._buffers[key] = buffer
        return buffer


def times_written(tensor: torch.Tensor) -> int:
    """The number of in-place writes to a tensor, which torch counts for autograd."""
    return tensor._version


def _as_bytes(tensor: torch.Tensor) -> Bytes:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy()
