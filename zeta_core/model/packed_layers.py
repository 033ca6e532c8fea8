"""Modules of a frozen base whose weights are packed in 4 bits, and are dequantized when they are used.

`PackedLinear` replaces a linear layer. Its product and the gradient of its input dequantize the weight, so autograd
saves only the packed one. `pack_stack` packs a parameter that contains the matrices of all experts; it is dequantized
while its module is called, and autograd saves it until the backward pass, unless the block is recomputed.

A weight can be packed later (``deferred``): until then, the module computes with the exact weight, which can map a
file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from zeta_core.model.packed_weights import pack, packed_bytes, quant_state, unpack
from zeta_core.parallel.deferred_weights import TAKE_SOURCES, WeightSource


class _PackedWeight:
    """The bytes of a weight of this shape, and the exact weight until it is packed."""

    def __init__(self, exact: torch.Tensor, dtype: torch.dtype) -> None:
        self.shape, self.dtype = exact.shape, dtype
        self.exact: torch.Tensor | None = exact.detach()

    def parameter(self) -> nn.Parameter:
        """The parameter for the bytes, without storage."""
        empty = torch.empty(packed_bytes(self.shape.numel()), dtype=torch.uint8, device="meta")
        return nn.Parameter(empty, requires_grad=False)

    def packed_now(self, device: torch.device) -> nn.Parameter:
        return nn.Parameter(self.take_source()(device), requires_grad=False)

    def take_source(self) -> WeightSource:
        """What computes the bytes on a device from the exact weight, which is given up here."""
        exact, dtype = self.exact, self.dtype
        assert exact is not None
        self.exact = None
        return lambda device: pack(exact, dtype, device)

    def dequantized(self, packed: torch.Tensor) -> torch.Tensor:
        return unpack(packed, self.shape, self.dtype) if self.exact is None else self.exact.to(self.dtype)


class PackedLinear(nn.Linear):
    """A linear layer with a packed weight, which computes in ``dtype``.

    ``weight`` is dequantized in each access, because peft's adapters read it.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, device: torch.device, *, deferred: bool) -> None:
        nn.Module.__init__(self)  # that of a linear layer allocates a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._weight = _PackedWeight(layer.weight, dtype)
        self.packed = self._weight.parameter() if deferred else self._weight.packed_now(device)
        bias = cast("nn.Parameter | None", layer.bias)
        if bias is not None:
            value = bias.detach() if deferred else bias.detach().to(device=device, dtype=dtype)
            bias = nn.Parameter(value, requires_grad=False)
        self.register_parameter("bias", bias)
        self.train(layer.training)

    @property
    def weight(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._weight.dequantized(self.packed)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        import bitsandbytes

        state, dtype = self._weight, self._weight.dtype
        bias = cast("nn.Parameter | None", self.bias)
        bias = None if bias is None else bias.to(dtype)
        x = input.to(dtype)
        if state.exact is not None:
            return nn.functional.linear(x, self.weight, bias).to(input.dtype)
        codes, found = quant_state(self.packed, state.shape, dtype)
        return cast(Any, bitsandbytes).matmul_4bit(x, codes.t(), bias=bias, quant_state=found).to(input.dtype)

    def take_sources(self) -> dict[str, WeightSource]:
        return {} if self._weight.exact is None else {"packed": self._weight.take_source()}


class _PackedStack:
    """Puts the dequantized weight into a module before its call, and the packed one after it.

    ``wrapper`` is the module, or the outermost of peft's wrappers, which read the weight before they call the module.
    """

    def __init__(self, wrapper: nn.Module, module: nn.Module, name: str, weight: _PackedWeight) -> None:
        self._module, self._name, self._weight = module, name, weight
        self._packed: nn.Parameter | None = None
        wrapper.register_forward_pre_hook(self._before)
        # Recomputing a block ends its call with an exception as soon as all that is needed was recomputed.
        wrapper.register_forward_hook(self._after, always_call=True)

    def _before(self, *_: Any) -> None:
        self._packed = self._module.get_parameter(self._name)
        dequantized = self._weight.dequantized(self._packed)
        setattr(self._module, self._name, nn.Parameter(dequantized, requires_grad=False))

    def _after(self, *_: Any) -> None:
        if self._packed is not None:
            setattr(self._module, self._name, self._packed)
            self._packed = None

    def take_sources(self) -> dict[str, WeightSource]:
        return {} if self._weight.exact is None else {self._name: self._weight.take_source()}


def pack_stack(
    wrapper: nn.Module, module: nn.Module, name: str, dtype: torch.dtype, device: torch.device, *, deferred: bool
) -> None:
    """Pack a parameter of ``module``, in place; it is dequantized to ``dtype`` while ``wrapper`` is called."""
    weight = _PackedWeight(module.get_parameter(name), dtype)
    setattr(module, name, weight.parameter() if deferred else weight.packed_now(device))
    stack = _PackedStack(wrapper, module, name, weight)
    earlier: Callable[[], dict[str, WeightSource]] | None = getattr(module, TAKE_SOURCES, None)
    setattr(module, TAKE_SOURCES, stack.take_sources if earlier is None else _Both(earlier, stack.take_sources))


class _Both:
    """The sources of two parameters of a module."""

    def __init__(self, *takes: Callable[[], dict[str, WeightSource]]) -> None:
        self._takes = takes

    def __call__(self) -> dict[str, WeightSource]:
        return {name: source for take in self._takes for name, source in take().items()}
