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
    """Copies tensors into buffers of its own, which are kept from one checkpoint to the next.

    Training waits for no copy that can be made beside it. What only an update changes (parameters and the optimizer's
    tensors) is put on a list by `copy_later`; the thread that writes the checkpoint works it off during the next step's
    forward and backward, and before the update training calls `finish`, too: it takes its share of what is left and
    returns when all is copied. Every promise is checked: a tensor that was written to in between makes `finish` raise,
    and nothing of that save is published (what goes through ``tensor.data`` is not seen).
    """

    def __init__(self) -> None:
        self._buffers: Tensors = {}
        self._later: deque[tuple[Bytes, Bytes]] = deque()  # to, from
        self._unfinished = 0  # pieces, on the list or in the hands of a thread
        self._promised: list[tuple[str, torch.Tensor, int]] = []
        self._broken: str | None = None
        self._moved = threading.Condition()
        self._wanted = threading.Event()

    def copy(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Copies made now; from a GPU they are on their way until `torch.cuda.synchronize`."""
        copies: Tensors = {}
        for name, tensor in tensors.items():
            source = tensor.detach()
            copies[name] = self._buffer(f"{prefix}{name}", source).copy_(source, non_blocking=True)
        return copies

    def copy_later(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Buffers that hold the tensors, as they are now, once `finish` has returned.

        For tensors that nothing changes before that. What is not one stretch of the CPU's memory is copied now: over
        its bus a GPU needs no more for it than the waiting would cost.
        """
        copies: Tensors = {}
        for name, tensor in tensors.items():
            source = tensor.detach()
            if source.device.type != "cpu" or not source.is_contiguous() or not source.nbytes:
                copies |= self.copy(prefix, {name: source})
                continue
            copies[name] = self._buffer(f"{prefix}{name}", source)
            to, of = _bytes_of(copies[name]), _bytes_of(source)
            pieces = [
                (to[at : at + _PIECE_BYTES], of[at : at + _PIECE_BYTES]) for at in range(0, len(of), _PIECE_BYTES)
            ]
            self._unfinished += len(pieces)
            self._later.extend(pieces)
            self._promised.append((name, source, times_written(source)))
        return copies

    def finish(self) -> None:
        """Copy what is left, beside other threads that do, and return when nothing is. Raises `InvalidModel`.

        One thread each: numpy copies without the threads of torch, which are busy, and without the interpreter's lock.
        """
        while True:
            try:
                to, of = self._later.popleft()
            except IndexError:
                break
            np.copyto(to, of)
            with self._moved:
                self._unfinished -= 1
                if not self._unfinished:
                    changed = [name for name, source, version in self._promised if times_written(source) != version]
                    self._broken = changed[0] if changed else None
                    self._promised.clear()
                    self._moved.notify_all()
        with self._moved:
            self._moved.wait_for(lambda: not self._unfinished)
        if self._broken is not None:
            raise InvalidModel(
                f"The model wrote to its parameter {self._broken} outside the optimizer's update, while it was saved; "
                "make it a buffer, or change it under the same optimizer."
            )

    def reserve(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make the buffers and touch their memory: what takes longest in a first copy, done before it is needed.

        For a thread beside the training; it leaves off when the buffers are wanted.
        """
        for name, tensor in tensors.items():
            if self._wanted.is_set():
                return
            _bytes_of(self._buffer(f"{prefix}{name}", tensor.detach())).fill(0)

    def stop_reserving(self) -> None:
        """The buffers are wanted now; those that were not touched yet will be when they are written."""
        self._wanted.set()

    def _buffer(self, key: str, like: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            if like.device.type == "cpu" and like.nbytes >= _PIECE_BYTES:
                # numpy asks the kernel for huge pages, which are touched twice as fast
                memory = np.empty(like.nbytes, dtype=np.uint8)
                buffer = torch.from_numpy(memory).view(like.dtype).view(like.shape)
            else:
                buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
            self._buffers[key] = buffer
        return buffer


def times_written(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place, as torch counts it for its gradients."""
    return tensor._version


def _bytes_of(tensor: torch.Tensor) -> Bytes:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy()
