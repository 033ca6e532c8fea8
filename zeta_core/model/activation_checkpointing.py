"""Activation checkpointing: each repeated block discards its activations and recomputes them in the backward pass.

The results of matrix products and of fused attention may be kept instead, because they take most of the time
(``selective``), and the inputs of the blocks may be moved to the memory of the host (``offload``).

The random state of the forward pass is saved and restored, so dropout draws the same mask and the gradients are equal;
accelerate's FSDP option does not do this (a gradient 50 % off with dropout 0.3). The module tree and the names in it do
not change: only the ``forward`` of each block instance is replaced, and restored afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from zeta_core.contract.spec.options import Checkpointing
from zeta_core.failures import CannotTrain

_ATEN = torch.ops.aten
_PRODUCTS = frozenset({_ATEN.mm.default, _ATEN.addmm.default, _ATEN._grouped_mm.default})
_ATTENTION = frozenset(
    {
        _ATEN._scaled_dot_product_flash_attention.default,
        _ATEN._scaled_dot_product_efficient_attention.default,
        _ATEN._scaled_dot_product_cudnn_attention.default,
        _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


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


def _saving_on_host() -> AbstractContextManager[Any]:
    return save_on_cpu(pin_memory=True)


@contextmanager
def recomputed_activations(
    blocks: list[nn.Module],
    how: Checkpointing,
    *,
    offloading: Callable[[], AbstractContextManager[Any]] = _saving_on_host,
) -> Generator[None]:
    """Make each of ``blocks`` recompute its activations within the context, unless ``how`` is False.

    With "offload", the context that ``offloading`` returns moves the inputs of the blocks to the host.
    """
    if not how:
        yield
        return
    with replaced_forwards(blocks, partial(_recomputing, how=how, offloading=offloading)):
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


def _recomputing(
    forward: Callable[..., Any], *, how: Checkpointing, offloading: Callable[[], AbstractContextManager[Any]]
) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
    if how == "selective":
        options["context_fn"] = _selective_contexts

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    def offloaded(*args: Any, **kwargs: Any) -> Any:
        with offloading():
            return recomputed(*args, **kwargs)

    return offloaded if how == "offload" else recomputed


def _selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of a block's forward pass, which keeps results, and of its recomputation, which uses them."""
    forward, recomputation = cast(
        "tuple[AbstractContextManager[Any], AbstractContextManager[Any]]", create_selective_checkpoint_contexts(_keeps)
    )
    return forward, _rejecting_changed_results(recomputation)


@contextmanager
def _rejecting_changed_results(recomputation: AbstractContextManager[Any]) -> Generator[None]:
    """Raise `CannotTrain` if the block has changed a kept result, which torch finds when it is used."""
    try:
        with recomputation:
            yield
    except RuntimeError as error:
        if "has been mutated" not in str(error):
            raise
        raise CannotTrain(
            "use_activation_checkpointing is 'selective', but a block of the model changes the result of a linear "
            "layer or of attention in place, as nn.ReLU(inplace=True) and x += y do.",
            hint="Recompute whole blocks, or let the block compute a new tensor.",
            patch={"use_activation_checkpointing": True},
            param="use_activation_checkpointing",
        ) from error


def _keeps(_: object, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether selective checkpointing keeps the result of an operation.

    A random operation is always recomputed. If one were kept, the next one would draw its numbers.
    """
    is_kept = operation in _PRODUCTS or (operation in _ATTENTION and not _dropout(operation, args, kwargs))
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _dropout(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The probability of dropout that fused attention is called with."""
    position = [argument.name for argument in operation._schema.arguments].index("dropout_p")
    return args[position] if len(args) > position else kwargs.get("dropout_p", 0.0)
