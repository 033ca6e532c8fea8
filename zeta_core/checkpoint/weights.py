"""The weights of a checkpoint: selecting, loading and verifying them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from zeta_core.checkpoint.row_file import DTYPE_NAMES
from zeta_core.checkpoint.staging import Tensors
from zeta_core.checkpoint.training_state import WEIGHTS_FILE
from zeta_core.contract.job.checkpoint import BEST_CHECKPOINT, FINAL_CHECKPOINT
from zeta_core.contract.wire.run_directory import TRAINING_STATE_NAME
from zeta_core.failures import CannotResume


@dataclass(frozen=True)
class SavedWeights:
    """The names of the weights in a checkpoint, one per storage, and the aliases of tied weights.

    ``whole`` contains the names for the whole model, if only a part is trained and the whole is saved as well.
    ``base_weights`` are weights that the model itself no longer has in this form: those of a quantized base.
    """

    names: frozenset[str]
    aliases: dict[str, str]
    whole: frozenset[str] | None = None
    base_weights: Tensors = field(default_factory=dict[str, torch.Tensor])

    def of(self, checkpoints: Collection[str]) -> frozenset[str]:
        """The names for checkpoints with these names; ``best`` and ``final`` contain the whole model."""
        needs_whole = bool({BEST_CHECKPOINT, FINAL_CHECKPOINT} & set(checkpoints))
        return self.whole if needs_whole and self.whole is not None else self.names


def unique_weights(state: Mapping[str, Any]) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a state dict, one per storage, and the aliases of tied tensors."""
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


def load_weights(module: nn.Module, directory: Path, names: Collection[str], *, mapped: bool = False) -> None:
    """Load a checkpoint's exact weights of these names into a module, in place; tied weights stay tied.

    With ``mapped``, parameters map the checkpoint's files instead of copying their content. Raises `CannotResume`.
    """
    weights = read_weights(directory)
    own, aliases = unique_weights(module.state_dict())
    own = {name: tensor for name, tensor in own.items() if name in names}
    missing = sorted(name for name in own if name not in weights)
    unknown = sorted(name for name in weights if name not in own and name not in aliases)
    if missing or unknown:
        difference = f"{len(missing)} missing ({missing[:2]}), {len(unknown)} unknown ({unknown[:2]})"
        raise CannotResume(f"The weights of {directory.name} do not match this model: {difference}.")
    parameters = dict(module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape:
                raise CannotResume(
                    f"{name} has shape {tuple(weights[name].shape)} in {directory.name}, but {tuple(tensor.shape)} "
                    "in the model."
                )
            if mapped and name in parameters:
                parameters[name].data = weights[name]
            else:
                tensor.copy_(weights[name])


def read_weights(directory: Path) -> Tensors:
    """The weights in training precision: the master copy, or the exported files if they are identical."""
    master = directory / TRAINING_STATE_NAME / WEIGHTS_FILE
    files = [master] if master.is_file() else sorted(directory.glob("model*.safetensors"))
    weights: Tensors = {}
    for file in files:
        weights.update(load_file(file))
    return weights


def is_exported_exactly(directory: Path, weights: Tensors) -> bool:
    """Whether the exported files contain all ``weights`` with the same names and data types."""
    stored: dict[str, tuple[str, list[int]]] = {}
    for path in directory.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                stored[name] = (part.get_dtype(), part.get_shape())
    return all(stored.get(name) == (DTYPE_NAMES.get(t.dtype), list(t.shape)) for name, t in weights.items())
