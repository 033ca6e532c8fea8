"""QLoRA: the linear layers of the base are quantized to 4 bits (nf4) by bitsandbytes; the adapter stays in float32.

`zeta_core.model.packed_weights` describes the format. A layer dequantizes its weights to the run's precision in each
forward and backward pass. With ``nf4-experts``, the stacked experts of a mixture-of-experts model are quantized, too.

Guarantees: the quantized weights are a function of the base's weights, so they are not stored, and a resumed run
computes them again. Embeddings, norms, biases, the output layer and weights shared by two layers are not quantized.
Importing bitsandbytes takes a second or two, so it is only imported to quantize a base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from zeta_core.contract.spec.options import Quantization
from zeta_core.failures import CannotTrain
from zeta_core.model.inspection import is_output_layer
from zeta_core.model.packed_layers import PackedLinear, pack_stack
from zeta_core.model.packed_weights import num_packed_weights
from zeta_core.optim.roles import Role, parameter_roles

FIRST_VERSION = (0, 46)  # of bitsandbytes with 4-bit kernels for CPUs
PARAM = "lora.quantize"


def require_bitsandbytes() -> None:
    """Raise `CannotTrain` if bitsandbytes is not installed, or is too old."""
    first = ".".join(map(str, FIRST_VERSION))
    try:
        installed = version("bitsandbytes")
    except PackageNotFoundError:
        problem = "which is not installed"
    else:
        if tuple(int(part) for part in installed.split(".")[:2]) >= FIRST_VERSION:
            return
        problem = f"but {installed} is installed"
    raise CannotTrain(
        f"{PARAM} is set, which requires bitsandbytes {first} or newer, {problem}.",
        hint="Run pip install 'zeta-train[quantize]', or remove lora.quantize to keep the base's precision.",
        patch={"lora": {"quantize": None}},
        param=PARAM,
        code="cannot_quantize",
    )


def quantize(
    model: nn.Module,
    kind: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    *,
    keep: Collection[str] = (),
    deferred: bool = False,
) -> None:
    """Quantize the linear layers to nf4, in place and one by one; they compute in ``dtype``.

    They are quantized on ``device`` and stay there; layers without storage are replaced by layers without storage. With
    ``deferred``, the exact weights stay until `zeta_core.parallel.deferred_weights` takes them. Layers inside the
    modules ``keep``, which are trained, are not quantized. Raises `CannotTrain` if there is nothing to quantize.
    """
    check_quantizable(model, kind, keep=keep)
    layers = _linear_layers(model, keep)
    while layers:  # a replaced layer has no other owner, so its memory is freed before the next one is quantized
        name, layer = layers.popitem()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, PackedLinear(layer, dtype, device, deferred=deferred))


def quantize_experts(
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    *,
    keep: Collection[str] = (),
    deferred: bool = False,
) -> None:
    """Quantize the parameters that contain the matrices of several experts, in place; see `quantize`.

    Call it after an adapter was added, because peft's wrappers read these parameters before they call the experts.
    """
    for wrapper, module, name in _stacked_experts(model, keep):
        pack_stack(wrapper, module, name, dtype, device, deferred=deferred)


def check_quantizable(model: nn.Module, kind: Quantization, *, keep: Collection[str] = ()) -> None:
    """Raise `CannotTrain` if this kind of quantization would have no effect on the model."""
    name = type(model).__name__
    if kind == "nf4-experts" and not _stacked_experts(model, keep):
        raise CannotTrain(
            f"{PARAM} is 'nf4-experts', but {name} has no parameters that contain several experts; use 'nf4'.",
            patch={"lora": {"quantize": "nf4"}},
            param=PARAM,
            code="cannot_quantize",
        )
    if kind == "nf4" and not _linear_layers(model, keep):
        raise CannotTrain(
            f"{PARAM} is 'nf4', but {name} has no linear layers that can be quantized.",
            hint="Remove lora.quantize; the base then keeps its own precision.",
            patch={"lora": {"quantize": None}},
            param=PARAM,
            code="cannot_quantize",
        )


def num_weights(parameter: torch.Tensor) -> int:
    """The number of weights in a parameter; a quantized one has almost two in each byte."""
    return num_packed_weights(parameter.numel()) if is_quantized(parameter) else parameter.numel()


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether the parameter contains packed weights. No other parameters are bytes: models are loaded in floats."""
    return parameter.dtype == torch.uint8


def _linear_layers(model: nn.Module, keep: Collection[str]) -> dict[str, nn.Linear]:
    """The layers to quantize by name; no subclasses, because they may use their weight in other ways."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {
        name: part
        for name, part in model.named_modules()
        if type(part) is nn.Linear
        and name
        and owners[id(part.weight)] == 1
        and not is_output_layer(part, model)
        and not _is_inside(name, keep)
    }


def _stacked_experts(model: nn.Module, keep: Collection[str]) -> list[tuple[nn.Module, nn.Module, str]]:
    """For each parameter with the matrices of several experts: the outermost wrapper, the module, and its name."""
    parts = dict(model.named_modules())
    stacks: list[tuple[nn.Module, nn.Module, str]] = []
    for name, role in parameter_roles(model, [model]).items():
        owner, _, last = name.rpartition(".")
        if role is not Role.EXPERTS or parts[owner].get_parameter(last).dim() != 3 or _is_inside(name, keep):
            continue
        wrapper = owner
        while wrapper.endswith(".base_layer"):  # peft's wrappers are nested if it adapts several parameters
            wrapper = wrapper.removesuffix(".base_layer")
        stacks.append((parts[wrapper], parts[owner], last))
    return stacks


def _is_inside(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
