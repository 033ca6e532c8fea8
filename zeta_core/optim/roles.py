"""Roles of parameters. The role, and not the number of dimensions, determines weight decay and the use of Muon.

| role      | parameters                                                            | decays | Muon                 |
|-----------|-----------------------------------------------------------------------|--------|----------------------|
| matrix    | weights of linear layers in the blocks, LoRA factors                  | yes    | yes                  |
| experts   | the matrices of all experts in one parameter: (experts, rows, columns)| yes    | each expert by itself|
| embedding | embeddings, learned positions                                         | yes    | no: AdamW            |
| head      | the output layer, and other linear layers outside the blocks          | yes    | no: AdamW            |
| kernel    | kernels of convolutions over all channels                             | yes    | no: AdamW            |
| router    | weights that choose experts (`router`, `gate` next to experts)        | no     | no: AdamW            |
| other     | biases, norms, depthwise kernels, `A_log`, `D`, `dt_bias`, scales,    | no     | no: AdamW            |
|           | gates and decays of recurrent layers, and unknown parameters          |        |                      |

A parameter that is not the known weight of a layer decays only if its name indicates a weight (`w1`, `in_proj_weight`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum

from torch import nn


class Role(StrEnum):
    MATRIX = "matrix"
    EXPERTS = "experts"
    EMBEDDING = "embedding"
    HEAD = "head"
    KERNEL = "kernel"
    ROUTER = "router"
    OTHER = "other"

    @property
    def decays(self) -> bool:
        return self not in (Role.ROUTER, Role.OTHER)

    @property
    def is_orthogonalized(self) -> bool:
        """Whether Muon trains parameters of this role; AdamW trains the others."""
        return self in (Role.MATRIX, Role.EXPERTS)


_LINEAR_CLASS = re.compile(r"linear|^(FSDP)?Conv1D$", re.IGNORECASE)  # Conv1D of transformers is a linear layer
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WEIGHT_NAME = re.compile(
    r"^weight_[ih]h_l\d|^w\d*_|(^|_)(weight|kernel|matrix|proj|w[a-z]?\d*|[qkvo])$", re.IGNORECASE
)
_NOT_A_WEIGHT = re.compile(r"bias|norm|scale|gamma|beta|alpha|decay|mix|time|gate|sink|mask|token|log|position|pos_")
_GATES = frozenset({"gate", "gating", "wg", "switch"})


def parameter_roles(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, Role]:
    """The role of every parameter by name; tied ones occur once. ``blocks`` are the repeated blocks, or the model."""
    modules = dict(model.named_modules())
    in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
    embeddings = [part.weight for part in modules.values() if isinstance(part, nn.Embedding)]
    embedded = {id(weight) for weight in embeddings}
    rows = {weight.shape[0] for weight in embeddings} if model in blocks else set[int]()
    heads = _output_weights(model)
    roles: dict[str, Role] = {}
    for name, parameter in model.named_parameters():
        role = _role(name, parameter, modules)
        if id(parameter) in embedded:
            role = Role.EMBEDDING
        elif role is Role.MATRIX and (
            id(parameter) in heads or id(parameter) not in in_blocks or parameter.shape[0] in rows
        ):
            role = Role.HEAD
        roles[name] = role
    return roles


def _role(name: str, parameter: nn.Parameter, modules: dict[str, nn.Module]) -> Role:
    path, _, own = name.rpartition(".")
    holder, words = modules[path], path.split(".")
    kind = type(holder).__name__
    if "lora_" in name:
        factor = parameter.dim() == 2 and "lora_magnitude" not in name and "bias" not in own
        return (Role.EMBEDDING if "lora_embedding" in name else Role.MATRIX) if factor else Role.OTHER
    if parameter.dim() < 2 or "norm" in kind.lower() or _is_bias(own):
        return Role.OTHER
    if _chooses_experts(words, kind, modules):
        return Role.ROUTER
    if isinstance(holder, _CONVOLUTIONS):
        return Role.OTHER if parameter.shape[1] == 1 else Role.KERNEL
    if own == "weight" and (isinstance(holder, nn.Linear) or _LINEAR_CLASS.search(kind)):
        return Role.MATRIX if parameter.dim() == 2 else Role.EXPERTS if _of_experts(words, own, kind) else Role.OTHER
    if own == "weight" and "embedding" in kind.lower():
        return Role.EMBEDDING
    if _of_experts(words, own, kind):
        return Role.EXPERTS if parameter.dim() == 3 and "scale" not in own else Role.OTHER
    is_weight = _WEIGHT_NAME.search(own) and not _NOT_A_WEIGHT.search(own.lower())
    return Role.MATRIX if is_weight and parameter.dim() == 2 and min(parameter.shape) > 1 else Role.OTHER


def _is_bias(own: str) -> bool:
    return own == "b" or "bias" in own.lower() or "norm" in own.lower()


def _of_experts(words: Sequence[str], own: str, kind: str) -> bool:
    return any("expert" in word.lower() for word in (*words[-1:], own, kind))


def _chooses_experts(words: Sequence[str], kind: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module that contains the parameter is a router, by its name or as a gate with experts next to it."""
    if "router" in kind.lower():
        return True
    for depth, word in enumerate(words):
        if "router" in word.lower() or "expert_gate" in word.lower():
            return True
        if word.lower() in _GATES:
            parent = modules[".".join(words[:depth])]
            siblings = [name for name, _ in (*parent.named_children(), *parent.named_parameters(recurse=False))]
            if any("expert" in name.lower() for name in siblings):
                return True
    return False


def _output_weights(model: nn.Module) -> set[int]:
    find = getattr(model, "get_output_embeddings", None)
    try:
        output = find() if callable(find) else None
    except (AttributeError, NotImplementedError):  # a base model without a head
        output = None
    return {id(parameter) for parameter in output.parameters()} if isinstance(output, nn.Module) else set()
