"""QLoRA: the linear layers of the base are quantized to 4 bits (nf4) by bitsandbytes; the adapter stays in float32.

The format is that of Dettmers et al. 2023 (arXiv 2305.14314): a weight is one of 16 values, 64 weights share a scale,
and the scales are quantized to 8 bits in groups of 256 ("double quantization"): 4.127 bits per weight. A layer
dequantizes its weights to the run's precision in each forward and backward pass.

Guarantees: the quantized weights are a function of the base's weights, so they are not stored, and a resumed run
computes them again. Embeddings, norms, biases, the output layer and weights shared by two layers are not quantized.
Importing bitsandbytes takes a second or two, so it is only imported to quantize a base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch
from torch import nn

from zeta_core.failures import CannotTrain
from zeta_core.model.inspection import is_output_layer

BLOCK_WEIGHTS = 64  # weights that share a scale
BLOCK_SCALES = 256  # scales that share a second-level scale in float32
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
        f"{PARAM} is 'nf4', which requires bitsandbytes {first} or newer, {problem}.",
        hint="Run pip install 'zeta-train[quantize]', or remove lora.quantize to keep the base's precision.",
        patch={"lora": {"quantize": None}},
        param=PARAM,
        code="cannot_quantize",
    )


def quantize(model: nn.Module, dtype: torch.dtype, device: torch.device, *, keep: Collection[str] = ()) -> None:
    """Quantize the linear layers to nf4, in place and one by one; they compute in ``dtype``.

    They are quantized on ``device`` and stay there; layers without storage are replaced by layers without storage.
    Layers inside the modules ``keep``, which are trained, are not quantized. Raises `CannotTrain` if there is no layer
    to quantize.
    """
    layers = {
        name: layer
        for name, layer in _linear_layers(model).items()
        if not any(name == kept or name.startswith(f"{kept}.") for kept in keep)
    }
    if not layers:
        raise CannotTrain(
            f"{PARAM} is 'nf4', but {type(model).__name__} has no linear layers that can be quantized.",
            hint="Remove lora.quantize; the base then keeps its own precision.",
            patch={"lora": {"quantize": None}},
            param=PARAM,
            code="cannot_quantize",
        )
    while layers:  # a replaced layer has no other owner, so its memory is freed before the next one is quantized
        name, layer = layers.popitem()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _quantized(layer, dtype, device))
    cast(Any, model).is_loaded_in_4bit = True  # tells peft which of its adapter layers to use


def num_weights(parameter: torch.Tensor) -> int:
    """The number of weights in a parameter; a quantized one has two in each byte."""
    return parameter.numel() * (2 if is_quantized(parameter) else 1)


def scale_bytes(parameter: torch.Tensor) -> int:
    """The bytes of the scales of a quantized parameter; 0 for other parameters."""
    if not is_quantized(parameter):
        return 0
    scales = -(-num_weights(parameter) // BLOCK_WEIGHTS)
    return scales + 4 * -(-scales // BLOCK_SCALES)


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether the parameter contains weights of a quantized layer, two in each byte."""
    return bool(getattr(parameter, "bnb_quantized", False))


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers to quantize by name; no subclasses, because they may use their weight in other ways."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {
        name: part
        for name, part in model.named_modules()
        if type(part) is nn.Linear and name and owners[id(part.weight)] == 1 and not is_output_layer(part, model)
    }


def _quantized(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    import bitsandbytes

    library: Any = bitsandbytes.nn  # its exports have no declared types
    quantized: Any = library.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    # On a CPU with bfloat16 instructions, an evaluation would repack the weights with coarser scales and break the
    # gradients of later steps (bitsandbytes 0.50, `Linear4bit.forward`).
    quantized.support_avx512bf16_for_cpu = False
    if layer.weight.is_meta:
        packed = torch.empty(-(-layer.weight.numel() // 2), 1, dtype=torch.uint8, device="meta")
        quantized.weight = library.Params4bit(packed, quant_type="nf4", bnb_quantized=True)
    else:
        # Weights are dequantized to the dtype that they are quantized from.
        weight = layer.weight.detach().to(device=device, dtype=dtype)
        quantized.weight = library.Params4bit(weight, quant_type="nf4", compress_statistics=True).to(device)
        quantized.quant_state = quantized.weight.quant_state
    if layer.bias is not None:  # pyright: ignore[reportUnnecessaryComparison] - it is optional
        quantized.bias = nn.Parameter(layer.bias.detach().to(device=device, dtype=dtype), requires_grad=False)
    return cast(nn.Module, quantized.train(layer.training))
