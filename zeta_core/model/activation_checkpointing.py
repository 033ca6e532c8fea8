"""Activation checkpointing: each repeated block discards its activations and recomputes them in the backward pass.

The random state of the forward pass is saved and restored, so dropout draws the same mask and the gradients are equal;
accelerate's FSDP option does not do this (a gradient 50 % off with dropout 0.3). The module tree and the names in it do
not change: only the ``forward`` of each block instance is replaced, and restored afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model stacks: those it declares itself, or else the most common class in its ModuleLists.

    If there are none, the whole model is one block.
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
            commonest, number = counts.most_common(1)[0]
            blocks = [child for child in stacked if type(child) is commonest] if number > 1 else []
    outermost = [
        block for block in blocks if not any(block is not other and _contains(other, block) for other in blocks)
    ]
    return outermost or [model]


def _contains(outer: nn.Module, inner: nn.Module) -> bool:
    return any(part is inner for part in outer.modules())


@contextmanager
def recomputed_activations(blocks: list[nn.Module]) -> Generator[None]:
    """Make each of ``blocks`` recompute its activations within the context."""
    with replaced_forwards(blocks, _recomputing):
        yield


@contextmanager
def replaced_forwards(
    blocks: list[nn.Module], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Generator[None]:
    """Replace each block's forward by ``wrap(forward)`` within the context. Blocks may be nested."""
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
