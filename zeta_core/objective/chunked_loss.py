"""The loss of a large vocabulary in chunks of rows, so that the logits of all tokens never exist at once.

The logits of 32,768 tokens and 128,256 entries of a vocabulary take 17 GB in float32, and their gradient as much again.
A Hugging Face model computes them from the output of its backbone: with an output layer, which may be tied to the
embedding and have a bias or an adapter, and with whatever the family adds, such as a scale or a soft cap. All of this
stays in the model's own ``forward``. It is called for each chunk, with a stand-in for the backbone that returns the
chunk's hidden states. This happens inside a call of the whole model, so wrappers (DDP, FSDP2) work as for any loss.

The gradient of a summed loss is computed chunk by chunk in the forward pass, so nothing is computed twice (as in Liger
Kernel, Hsu et al. 2024, arXiv 2410.10989, section 3.2; torch's `linear_cross_entropy` does the same for plain linear
layers). The losses of single tokens have weights that are unknown in the forward pass, so their chunks are recomputed
in the backward pass.

Shapes: B sequences, T tokens, N rows (tokens with a target), H values of a hidden state, V entries of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from zeta_core.data.sequences import IGNORED

CHUNK_LOGITS = 16 << 20  # 64 MiB in float32

Logits = Callable[[torch.Tensor], torch.Tensor]  # from (N, H) hidden states to (N, V)


@dataclass(frozen=True)
class OutputHead:
    """The part of a model's forward that computes the logits from the output of the backbone.

    ``backbone`` is the name of the module. ``parameters`` are the names of those that the head uses; sharding replaces
    the parameters themselves.
    """

    backbone: str
    parameters: tuple[str, ...]
    vocab_size: int

    def exceeds_a_chunk(self, num_rows: int) -> bool:
        return num_rows * self.vocab_size > CHUNK_LOGITS

    @property
    def chunk_rows(self) -> int:
        return max(1, CHUNK_LOGITS // self.vocab_size)


@dataclass(frozen=True)
class LossTargets:
    """The rows whose loss is computed, as positions in the flattened (B x T) tokens, and their targets.

    With ``each``, the result has one loss for each row; otherwise it is their sum.
    """

    rows_N: torch.Tensor
    ids_N: torch.Tensor
    each: bool = False


class HeadLoss(NamedTuple):
    """The loss of each row or their sum, the model's auxiliary loss, and how many targets have the highest logit.

    ``num_correct`` is 0 if the losses of single rows were computed for a gradient.
    """

    loss: torch.Tensor
    auxiliary: torch.Tensor | None
    num_correct: torch.Tensor


@contextmanager
def returning_losses(model: nn.Module, head: OutputHead) -> Generator[None]:
    """Let ``model(..., loss_targets=LossTargets(...))`` return a `HeadLoss`.

    ``model`` may be wrapped in DDP, or sharded with FSDP2.
    """
    inner = cast("nn.Module", model.module) if isinstance(model, DistributedDataParallel) else model
    original, replaced = inner.forward, vars(inner).get("forward")

    def forward(*, loss_targets: LossTargets, **values: Any) -> HeadLoss:
        return _losses(_SeparatedModel(inner, original, head.backbone), head, loss_targets, values)

    inner.forward = forward
    try:
        yield
    finally:
        del inner.forward
        if replaced is not None:
            inner.forward = replaced


def find_output_head(model: nn.Module, values: Mapping[str, Any]) -> OutputHead | None:
    """The head of a Hugging Face model if it can be separated from the backbone; ``values`` are arguments of a call.

    The values of its logits are not compared with those of the whole model. A model that can't be called in this way
    may raise any exception.
    """
    prefix = getattr(model, "base_model_prefix", "")
    found = [name for name in (prefix, "model", f"{prefix}.decoder") if _has_module(model, name)]
    for backbone in dict.fromkeys(found):
        separated = _SeparatedModel(model, model.forward, backbone)
        hidden_BTH, _ = separated.run_backbone(values)
        if hidden_BTH is not None:
            return _head_after(backbone, hidden_BTH, model, separated.head(values))
    return None


def _head_after(backbone: str, hidden_BTH: torch.Tensor, model: nn.Module, head: Logits) -> OutputHead | None:
    """The head, with the parameters that its logits depend on; None if they aren't all parameters of the model."""
    with torch.enable_grad():
        rows_NH = hidden_BTH.detach().flatten(0, 1).requires_grad_()
        logits_NV = head(rows_NH)
    leaves = [leaf for leaf in _leaves(logits_NV) if leaf is not rows_NH]
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    if logits_NV.shape[:-1] != rows_NH.shape[:-1] or any(id(leaf) not in names for leaf in leaves):
        return None
    return OutputHead(backbone, tuple(names[id(leaf)] for leaf in leaves), logits_NV.shape[-1])


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        return bool(name) and model.get_submodule(name) is not model
    except AttributeError:
        return False


# --- Separating the head from the backbone ----------------------------------------------------------------------------


class _SeparatedModel:
    """Runs the backbone of a model and its head one after the other, with a stand-in for the backbone."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any], name: str) -> None:
        path, _, self._name = name.rpartition(".")
        self._model, self._forward = model, forward
        self._modules = cast("dict[str, nn.Module]", model.get_submodule(path)._modules)  # pyright: ignore[reportPrivateUsage]
        self._backbone = self._modules[self._name]
        self._output_type: Any = None

    def run_backbone(self, values: Mapping[str, Any]) -> tuple[torch.Tensor | None, Any]:
        """The (B, T, H) hidden states of a call, and the model's output, which has the logits of one token only.

        The hidden states are None if the model did not call this module.
        """
        first = _FirstToken(self._backbone)
        with self._replaced(first):
            output = self._forward(**values)
        if first.output is None:
            return None, output
        self._output_type = type(first.output)
        return first.output.last_hidden_state, output

    def head(self, values: Mapping[str, Any]) -> Logits:
        """The function of hidden states that the model computes after its backbone, after a call with ``values``."""
        # Ids, positions and masks have the shape of the whole batch, and the head doesn't use them.
        constant = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor | dict)}
        if "output_router_logits" in inspect.signature(type(self._model).forward).parameters:
            constant["output_router_logits"] = False  # the call of the backbone returns the auxiliary loss

        def logits(rows_NH: torch.Tensor) -> torch.Tensor:
            rows = _Rows(self._backbone, self._output_type(last_hidden_state=rows_NH[None]))
            ids_1N = torch.zeros(1, len(rows_NH), dtype=torch.long, device=rows_NH.device)
            with self._replaced(rows):
                return self._forward(input_ids=ids_1N, **constant).logits[0]

        return logits

    def parameters(self, names: Sequence[str]) -> list[nn.Parameter]:
        return [self._model.get_parameter(name) for name in names]

    @contextmanager
    def _replaced(self, stand_in: nn.Module) -> Generator[None]:
        self._modules[self._name] = stand_in
        try:
            yield
        finally:
            self._modules[self._name] = self._backbone


class _StandIn(nn.Module):
    """Takes the place of a backbone for one call. The model may read the attributes of the real one."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_real", backbone)  # not registered as its module

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_real"), name)


class _FirstToken(_StandIn):
    """Calls the backbone, keeps its output, and returns the first token only."""

    output: Any = None

    def forward(self, *args: Any, **values: Any) -> Any:
        self.output = object.__getattribute__(self, "_real")(*args, **values)
        first = self.output.last_hidden_state[:, :1].detach()
        return type(self.output)(**{**self.output, "last_hidden_state": first})


class _Rows(_StandIn):
    """Returns the given output."""

    def __init__(self, backbone: nn.Module, output: Any) -> None:
        super().__init__(backbone)
        self.output = output

    def forward(self, *args: Any, **values: Any) -> Any:
        return self.output


def _leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The leaves of the tensor's graph that require a gradient."""
    found: dict[int, torch.Tensor] = {}
    seen, left = set[Any](), [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left.extend(following for following, _ in node.next_functions)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor):
            found[id(leaf)] = leaf
    return list(found.values())


# --- The loss in chunks -----------------------------------------------------------------------------------------------


def _losses(model: _SeparatedModel, head: OutputHead, targets: LossTargets, values: Mapping[str, Any]) -> HeadLoss:
    hidden_BTH, output = model.run_backbone(values)
    assert hidden_BTH is not None, "the model called its backbone when the head was found"
    rows_NH = hidden_BTH.flatten(0, 1)[targets.rows_N]
    chunks = _Chunks(model.head(values), targets.ids_N, head.chunk_rows)
    num_correct = torch.zeros((), dtype=torch.long, device=rows_NH.device)
    if targets.each and torch.is_grad_enabled():
        loss = torch.cat([_recomputed(chunks.logits, rows, ids) for rows, ids in chunks.of(rows_NH)])
    elif torch.is_grad_enabled():
        parameters = model.parameters(head.parameters)
        loss, num_correct = cast("tuple[Any, Any]", _SumWithGradient.apply(chunks, rows_NH, *parameters))
    else:
        losses: list[torch.Tensor] = []
        for rows, ids in chunks.of(rows_NH):
            logits_NV = chunks.logits(rows)
            losses.append(_loss(logits_NV, ids, "none" if targets.each else "sum"))
            num_correct += _num_correct(logits_NV, ids)
        loss = torch.cat(losses) if targets.each else sum(losses, torch.zeros((), device=rows_NH.device))
    return HeadLoss(loss, getattr(output, "aux_loss", None), num_correct)


def _num_correct(logits_NV: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    return (logits_NV.detach().argmax(-1) == ids_N).sum()


def _loss(logits_NV: torch.Tensor, ids_N: torch.Tensor, reduction: str) -> torch.Tensor:
    return F.cross_entropy(logits_NV.float(), ids_N, ignore_index=IGNORED, reduction=reduction)


def _recomputed(logits: Logits, rows_NH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    """The loss of each row. Autograd saves the hidden states instead of the logits."""

    def losses(rows_NH: torch.Tensor) -> torch.Tensor:
        return _loss(logits(rows_NH), ids_N, "none")

    return cast("torch.Tensor", checkpoint(losses, rows_NH, use_reentrant=False))


@dataclass(frozen=True)
class _Chunks:
    logits: Logits
    ids_N: torch.Tensor
    size: int

    def of(self, rows_NH: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from zip(rows_NH.split(self.size), self.ids_N.split(self.size), strict=True)


class _SumWithGradient(torch.autograd.Function):
    """The sum of the rows' losses, and the number of correct rows.

    The forward pass also computes the gradient of the sum, and the backward pass scales it. The gradients of the
    parameters are summed over the chunks in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, chunks: _Chunks, rows_NH: torch.Tensor, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        total = torch.zeros((), device=rows_NH.device)
        num_correct = torch.zeros((), dtype=torch.long, device=rows_NH.device)
        sums: list[torch.Tensor | None] = [None] * len(trained)
        rows_gradient_NH = torch.empty_like(rows_NH)
        for (rows, ids), rows_gradient in zip(
            chunks.of(rows_NH.detach()), rows_gradient_NH.split(chunks.size), strict=True
        ):
            with torch.enable_grad():
                inputs = rows.requires_grad_()
                logits_NV = chunks.logits(inputs)
                loss = _loss(logits_NV, ids, "sum")
            num_correct += _num_correct(logits_NV, ids)
            del logits_NV
            gradient, *others = torch.autograd.grad(loss, [inputs, *trained])
            rows_gradient.copy_(gradient)
            sums = [new.float() if old is None else old.add_(new) for old, new in zip(sums, others, strict=True)]
            total += loss.detach()
        gradients = iter(sums)
        ctx.gradients = [rows_gradient_NH, *(next(gradients) if p.requires_grad else None for p in parameters)]
        ctx.dtypes = [rows_NH.dtype, *(parameter.dtype for parameter in parameters)]
        ctx.mark_non_differentiable(num_correct)
        return total, num_correct

    @staticmethod
    def backward(ctx: Any, *scale: torch.Tensor) -> Any:
        gradients = [
            None if gradient is None else gradient.mul_(scale[0]).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return None, *gradients
