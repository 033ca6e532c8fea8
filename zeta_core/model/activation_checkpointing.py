"""Activation checkpointing: each repeated block forgets its inner activations and computes them again for its gradient.

The random state of the first pass is kept and used again, so dropout draws the same and gradients stay equal;
accelerate's FSDP option does not do this (a gradient 50 % off with dropout 0.3). Blocks keep their place and their
names: only their forward is replaced, on the object, and can be put back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model is a stack of: those it names itself, else the class most often found in a ModuleList.

    A model without any is one block, the whole of it.
    """
    named = set[str](getattr(model, "_no_split_modules", None) or ())
    blocks = [part for part in model.modules() if type(part).__name__ in named]
    if not blocks:
        stacked = [
            child
            for part in model.modules()
            if isinstance(part, nn.ModuleList | nn.Sequential)
            for child in part.children()
            if any(True for _ in child.children())
        ]
        counts = Counter(type(child) for child in stacked)
        if counts:
            most, number = counts.most_common(1)[0]
            blocks = [child for child in stacked if type(child) is most] if number > 1 else []
    outermost = [block for block in blocks if not any(block is not other and _holds(other, block) for other in blocks)]
    return outermost or [model]


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return any(part is inner for part in outer.modules())


@contextmanager
def recomputed_activations(blocks: list[nn.Module]) -> Generator[None]:
    """Within it every one of ``blocks`` recomputes its activations."""
    with replaced_forwards(blocks, _recomputing):
        yield


@contextmanager
def replaced_forwards(
    blocks: list[nn.Module], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Generator[None]:
    """Within it each block's forward is ``wrap`` of what it was; one may lie within another."""
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = wrap(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)

    return recomputed
