"""Counting the buffers of FSDP2 in a pass over a model that is not sharded.

Each group of parameters (a repeated block, or everything outside of the blocks) is gathered before its forward and its
backward pass and released afterwards; its gradients are reduced when its backward pass is complete. The events and
the lifetimes of the buffers are those of torch 2.13 (`torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py`).
`tests/zeta_core/memory/test_estimates.py` compares the result with a sharded model.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

REDUCED_BYTES = 4  # per gradient: `FullySharded` reduces in float32


class Counter(Protocol):
    def add(self, size: int) -> None: ...


@contextmanager
def gathered_weights(
    model: nn.Module, blocks: list[nn.Module], counter: Counter, num_processes: int, *, from_host: bool = False
) -> Generator[None]:
    """Within the context, passes over ``model`` count the buffers of FSDP2 on ``num_processes`` processes.

    The parameters have the precision of the computation and no gradients. They are not counted themselves. With
    ``from_host``, the shards are in the memory of the host, and are copied to the device before they are gathered.
    """
    pass_ = _Pass(counter, num_processes, from_host=from_host)
    inner = [block for block in blocks if block is not model]
    in_blocks = {id(parameter) for block in inner for parameter in block.parameters()}
    root = _Group(pass_, (p for p in model.parameters() if id(p) not in in_blocks), stays_gathered=True)
    groups = [_Group(pass_, block.parameters(), stays_gathered=False) for block in inner]
    handles = [
        handle for part, group in zip((model, *inner), (root, *groups), strict=True) for handle in group.hook(part)
    ]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")  # there may be no input with a gradient
            yield
        for group in (root, *groups):  # those whose inputs need no gradient, and the root, are reduced at the end
            group.after_backward()
        pass_.release_reduced(0)
    finally:
        for handle in handles:
            handle.remove()


class _Pass:
    """The buffers that are shared by all groups."""

    def __init__(self, counter: Counter, num_processes: int, *, from_host: bool) -> None:
        self.counter, self.num_processes, self.from_host = counter, num_processes, from_host
        self.order: list[_Group] = []  # in which the forward passes ended
        self._kept = 0  # the result of the latest gathering, which the next one of the forward pass releases
        self._reduced = 0  # the gradients that are being reduced

    def keep_gathered(self, size: int) -> None:
        self.counter.add(-self._kept)
        self._kept = size

    def release_reduced(self, following: int) -> None:
        self.counter.add(-self._reduced)
        self._reduced = following


class _Group:
    """The parameters that are gathered together."""

    def __init__(self, pass_: _Pass, parameters: Iterable[nn.Parameter], *, stays_gathered: bool) -> None:
        self._pass, self._parameters, self._stays_gathered = pass_, list(parameters), stays_gathered
        self._size = sum(parameter.nbytes for parameter in self._parameters)
        # A single process copies its weights directly.
        self._transferred = self._size if pass_.num_processes > 1 else 0
        self._copied = self._size // pass_.num_processes if pass_.from_host else 0
        trained = sum(parameter.numel() for parameter in self._parameters if parameter.requires_grad)
        self._reduced = REDUCED_BYTES * trained
        self._is_gathered = self._is_prefetched = self._is_reduced = False

    def hook(self, part: nn.Module) -> list[RemovableHandle]:
        return [
            part.register_forward_pre_hook(self._before_forward),
            part.register_forward_hook(self._after_forward),
            part.register_full_backward_pre_hook(self._before_backward),
            *([] if self._stays_gathered else [part.register_full_backward_hook(self._after_backward_of)]),
        ]

    def _before_forward(self, *_: Any) -> None:
        if self._is_gathered:
            return
        counter = self._pass.counter
        self._add_transferred()
        counter.add(self._size)
        self._pass.keep_gathered(self._transferred)  # `wait_for_unshard` holds the previous result until it returns
        self._is_gathered = True

    def _after_forward(self, *_: Any) -> None:
        if self._stays_gathered:
            self._pass.keep_gathered(0)
            return
        self._release()
        self._pass.order.append(self)

    def _before_backward(self, *_: Any) -> None:
        counter, order = self._pass.counter, self._pass.order
        if not self._is_gathered:
            if not self._is_prefetched:
                self._add_transferred()
            counter.add(self._size)
            counter.add(-self._transferred)
            self._is_gathered, self._is_prefetched = True, False
        at = order.index(self) if self in order else len(order)  # the root is the last one
        if at:
            order[at - 1].prefetch()

    def prefetch(self) -> None:
        if not self._is_gathered and not self._is_prefetched:
            self._add_transferred()
            self._is_prefetched = True

    def _add_transferred(self) -> None:
        self._pass.counter.add(self._copied + self._transferred)
        self._pass.counter.add(-self._copied)

    def _after_backward_of(self, *_: Any) -> None:
        self.after_backward()

    def after_backward(self) -> None:
        """Release the weights and reduce the gradients, once."""
        if self._is_reduced:
            return
        self._is_reduced = True
        self._release()
        self._pass.release_reduced(0)
        if not self._reduced:
            return
        counter, own = self._pass.counter, self._reduced // self._pass.num_processes
        counter.add(self._reduced)
        for parameter in self._parameters:
            parameter.grad = None
        counter.add(own)
        counter.add(-own)
        self._pass.release_reduced(self._reduced)

    def _release(self) -> None:
        if self._is_gathered:
            self._pass.counter.add(-self._size)
            self._is_gathered = False
