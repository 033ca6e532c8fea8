"""The weights of a checkpoint: which ones it contains, and how they are read back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from zeta_core.checkpoint.staging import Tensors
from zeta_core.contract.wire.run_directory import TRAINING_STATE_NAME
from zeta_core.failures import CannotResume


@dataclass(frozen=True)
class SavedWeights:
    """Which weights a checkpoint holds: by name, each storage once, and the other names of those that are tied.

    ``kept`` are weights of the whole that the model does not hold as they are: those of a quantised base.
    """

    names: frozenset[str]
    aliases: dict[str, str]
    whole: frozenset[str] | None = None  # those of the whole model, where only a part is trained and the whole is asked
    kept: Tensors = field(default_factory=dict[str, torch.Tensor])

    def of(self, checkpoints: Collection[str]) -> frozenset[str]:
        """The names for checkpoints that are called so: the whole model is for those that stay."""
        return self.whole if self.whole is not None and {"best", "final"} & set(checkpoints) else self.names


def unique_weights(state: Mapping[str, Any]) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a state dict, each storage once, and the other names of those that are tied."""
    unique: Tensors = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in seen:
            aliases[name] = seen[identity]
        else:
            seen[identity] = name
            unique[name] = tensor
    return unique, aliases


def load_weights(module: nn.Module, directory: Path, names: Collection[str]) -> None:
    """Put a checkpoint's exact weights of these names into a module, in place; tied weights stay tied.

    Raises `CannotResume`.
    """
    weights = read_weights(directory)
    own, aliases = unique_weights(module.state_dict())
    own = {name: tensor for name, tensor in own.items() if name in names}
    missing = sorted(name for name in own if name not in weights)
    unknown = sorted(name for name in weights if name not in own and name not in aliases)
    if missing or unknown:
        names = f"{len(missing)} are missing ({missing[:2]}), {len(unknown)} unknown ({unknown[:2]})"
        raise CannotResume(f"The weights of {directory.name} are not those of this model: {names}.")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape:
                raise CannotResume(
                    f"{name} has shape {tuple(weights[name].shape)} in {directory.name}, and {tuple(tensor.shape)} "
                    "in the model."
                )
            tensor.copy_(weights[name])


def read_weights(directory: Path) -> Tensors:
    """The weights as they are trained: the master copy, or the exported files where they are the same."""
    master = directory / TRAINING_STATE_NAME / "weights.safetensors"
    files = [master] if master.is_file() else sorted(directory.glob("model*.safetensors"))
    weights: Tensors = {}
    for file in files:
        weights.update(load_file(file))
    return weights


def is_exported_exactly(directory: Path, weights: Tensors) -> bool:
    """Whether the exported files hold every one of ``weights`` under its own name, with its own precision."""
    kinds: dict[str, tuple[str, list[int]]] = {}
    for path in directory.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                kinds[name] = (part.get_dtype(), part.get_shape())
    return all(kinds.get(name) == (_WORDS.get(t.dtype), list(t.shape)) for name, t in weights.items())


_WORDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}
