"""A base in 4 bits, as QLoRA has it: its linear layers in nf4 by bitsandbytes, the adapter beside them in float32.

The format is that of Dettmers et al. 2023 (arXiv 2305.14314): a weight is one of 16 values, 64 weights have a scale
together, and 256 scales are 8 bits each with a scale of their own ("double quantisation"): 4.127 bits a weight. A layer
takes its weights out of the quantisation each time it computes, forward and backward, in the run's precision.

Guaranteed: what is quantised is a function of the base's weights, so it is stored nowhere and made again when a run is
resumed. Embeddings, norms, biases, the layer that gives the logits and weights that two layers share stay as they are.
Importing bitsandbytes takes a second or two, so it happens where a base is quantised and nowhere else.
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

BLOCK_WEIGHTS = 64  # that share a scale
BLOCK_SCALES = 256  # that share a scale of theirs, a float32
FIRST_VERSION = (0, 46)  # of bitsandbytes that computes with 4 bits on CPUs, too
PARAM = "lora.quantize"


def require_bitsandbytes() -> None:
    """Raise `CannotTrain` where bitsandbytes is not installed here, or is too old."""
    first = ".".join(map(str, FIRST_VERSION))
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        lacking = "which is not installed here"
    else:
        if tuple(int(part) for part in found.split(".")[:2]) >= FIRST_VERSION:
            return
        lacking = f"and {found} is installed here"
    raise CannotTrain(
        f"{PARAM} is 'nf4', which needs bitsandbytes {first} or newer, {lacking}.",
        hint="pip install 'zeta-train[quantize]', or leave it out: the base keeps its own precision then.",
        patch={"lora": {"quantize": None}},
        param=PARAM,
        code="cannot_quantize",
    )


def quantize(model: nn.Module, dtype: torch.dtype, device: torch.device, *, keep: Collection[str] = ()) -> None:
    """Put the linear layers into nf4, in place and one after the other; ``dtype`` is what they compute in.

    ``device`` is where they are quantised and stay; a model without storage gets layers of the right size without one.
    The layers of the modules ``keep``, which are trained, are not quantised.
    Raises `CannotTrain` where the model has none.
    """
    layers = {
        name: layer
        for name, layer in _linear_layers(model).items()
        if not any(name == kept or name.startswith(f"{kept}.") for kept in keep)
    }
    if not layers:
        raise CannotTrain(
            f"{PARAM} is 'nf4', but {type(model).__name__} has no linear layers of its own to hold in 4 bits.",
            hint="Leave it out; the base keeps its own precision.",
            patch={"lora": {"quantize": None}},
            param=PARAM,
            code="cannot_quantize",
        )
    while layers:  # one that is replaced has no other owner, so its memory is free before the next one needs some
        name, layer = layers.popitem()
        place, _, last = name.rpartition(".")
        setattr(model.get_submodule(place), last, _quantized(layer, dtype, device))
    cast(Any, model).is_loaded_in_4bit = True  # how peft knows which of its layers goes around these


def num_weights(parameter: torch.Tensor) -> int:
    """How many weights a parameter stands for: two in each byte of a quantised one."""
    return parameter.numel() * (2 if _is_packed(parameter) else 1)


def scale_bytes(parameter: torch.Tensor) -> int:
    """What the scales of a quantised parameter take beside it; 0 for any other."""
    if not _is_packed(parameter):
        return 0
    scales = -(-num_weights(parameter) // BLOCK_WEIGHTS)
    return scales + 4 * -(-scales // BLOCK_SCALES)


def _is_packed(parameter: torch.Tensor) -> bool:
    return bool(getattr(parameter, "bnb_quantized", False))


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """By name; of exactly this class, because others read their weight in ways of their own."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {
        name: part
        for name, part in model.named_modules()
        if type(part) is nn.Linear and name and owners[id(part.weight)] == 1 and not is_output_layer(part, model)
    }


def _quantized(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    import bitsandbytes

    library: Any = bitsandbytes.nn  # what it exports, it does not declare
    made: Any = library.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    # On a CPU with bfloat16 instructions an evaluation would repack the weights for itself, with coarser scales and
    # without a gradient for the steps that follow (bitsandbytes 0.50, `Linear4bit.forward`).
    made.support_avx512bf16_for_cpu = False
    if layer.weight.is_meta:
        packed = torch.empty(-(-layer.weight.numel() // 2), 1, dtype=torch.uint8, device="meta")
        made.weight = library.Params4bit(packed, quant_type="nf4", bnb_quantized=True)
    else:
        # What it is quantised from is what it is taken out of the quantisation to.
        weight = layer.weight.detach().to(device=device, dtype=dtype)
        made.weight = library.Params4bit(weight, quant_type="nf4", compress_statistics=True).to(device)
        made.quant_state = made.weight.quant_state
    if layer.bias is not None:  # pyright: ignore[reportUnnecessaryComparison] - it may be left out
        made.bias = nn.Parameter(layer.bias.detach().to(device=device, dtype=dtype), requires_grad=False)
    return cast(nn.Module, made.train(layer.training))
