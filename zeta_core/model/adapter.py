"""Writing a peft adapter for other programs, and merging it into its base.

peft's layers replace the adapted ones inside the model, so it is called, wrapped and sharded as before. The names of
its weights then contain ``.base_layer`` and ``lora_...``; those in the files are peft's own, such as
``base_model.model.<layer>.lora_A.weight``.

Importing peft takes seconds, so only functions that need an adapter do it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from zeta_core.checkpoint.staging import Tensors
from zeta_core.contract.identifiers import is_hub_id
from zeta_core.failures import CannotTrain
from zeta_core.model.located_model import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class _Layer:
    """The change that an adapter makes to the weight of its layer: ``scaling`` times B A, or the transpose of it.

    ``norms`` is the name of DoRA's trained norms of the changed weight, one per output of the layer.
    """

    scaling: float
    transposed: bool
    embeds: bool
    norms: str | None


@dataclass(frozen=True)
class _Stack:
    """The change that an adapter makes to a parameter that contains the matrices of several experts.

    Each expert's change is ``scaling`` times B A. The parameter has the shape (experts, out, in), or with
    ``transposed`` (experts, in, out); a parameter of one matrix is always (out, in).
    """

    parameter: str  # its name in the base
    num_experts: int
    scaling: float
    transposed: bool

    def change(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The change for peft's factors, of the shapes (experts x rank, in) and (out, rank x experts)."""
        if self.num_experts == 1:
            return b @ a * self.scaling
        a_ERI = a.reshape(self.num_experts, -1, a.shape[-1])
        b_ORE = b.reshape(b.shape[0], -1, self.num_experts)
        return torch.einsum("ore,eri->eio" if self.transposed else "ore,eri->eoi", b_ORE, a_ERI) * self.scaling


@dataclass(frozen=True)
class Adapter:
    """The adapter of a model: its weights by their names in the model, and how to save and merge it.

    ``note`` explains what happens to resized embeddings, and ``resized_to`` is their new number of rows.
    """

    names: frozenset[str]
    note: str | None
    resized_to: int | None
    _name: str  # peft's name for the adapter
    _files: Mapping[str, str]  # names in the file -> in the model
    _config: dict[str, Any]
    _layers: Mapping[str, _Layer]
    _stacks: Mapping[str, _Stack]

    @staticmethod
    def of(
        model: nn.Module,
        name: str,
        config: LoraConfig,
        base_model: str | None,
        *,
        resized_to: int | None = None,
        note: str | None = None,
        with_embeddings: bool = False,
    ) -> Adapter:
        """Describe the adapter of this name in ``model``, with the frozen embeddings if they were resized."""
        files = adapter_files(model, name, with_embeddings=with_embeddings)
        saved = _saved_config(config, base_model)
        layers, stacks = _layers(model, name), _stacks(model, name)
        return Adapter(frozenset(files.values()), note, resized_to, name, files, saved, layers, stacks)

    def write(self, folder: Path, weights: Tensors) -> None:
        """Write ``weights`` and the config in peft's layout."""
        own: Tensors = {}
        for file_name, name in sorted(self._files.items()):
            shared = any(weights[name] is tensor for tensor in own.values())  # safetensors refuses tied weights
            own[f"base_model.model.{file_name}"] = weights[name].clone() if shared else weights[name]
        save_file(own, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(self._config, indent=2, sort_keys=True) + "\n")

    def base_name(self, name: str) -> str:
        """The name of a weight of the adapted model in its base."""
        return _without_wrappers(name).replace(".original_module.", ".").replace(self._replacing, ".", 1)

    def merged(self, weights: Tensors) -> Tensors:
        """The whole model's weights under the base's names, with the adapter added in float32."""
        merged = {self.base_name(name): tensor for name, tensor in weights.items() if name not in self.names}
        for name in self.names:
            if self._replacing in name:
                merged[self.base_name(name)] = weights[name]
        for layer_name, layer in self._layers.items():
            a, b = (
                (f"{layer_name}.lora_embedding_{x}.{self._name}" for x in "AB")
                if layer.embeds
                else (f"{layer_name}.lora_{x}.{self._name}.weight" for x in "AB")
            )
            change = weights[b].float() @ weights[a].float() * layer.scaling
            name = f"{layer_name}.weight"
            merged[name] = merged[name].float() + (change.T if layer.transposed else change)
            if layer.norms is not None:
                norms = weights[layer.norms].float().unsqueeze(0 if layer.transposed else 1)
                merged[name] *= norms / merged[name].norm(dim=0 if layer.transposed else 1, keepdim=True)
        for wrapper, stack in self._stacks.items():
            a, b = (weights[f"{wrapper}.lora_{x}.{self._name}.weight"].float() for x in "AB")
            merged[stack.parameter] = merged[stack.parameter].float() + stack.change(a, b)
        return merged

    @property
    def _replacing(self) -> str:
        """The part of the names of modules that are trained as a whole."""
        return f".modules_to_save.{self._name}."


def adapter_files(model: nn.Module, name: str, *, with_embeddings: bool = False) -> dict[str, str]:
    """The names of an adapter's weights: in peft's file -> in the model. Tied weights have several names in the file.

    Raises `CannotTrain` for adapters whose files are not a selection of the model's weights.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict

    state = model.state_dict()
    names = {id(tensor): own for own, tensor in state.items()}
    first: dict[int, str] = {}
    for own, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), own)
    canonical = {own: first[id(p)] for own, p in model.named_parameters(remove_duplicate=False)}
    # peft's default, "auto", would ask the Hub whether the embeddings were resized.
    tensors: Tensors = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=name, save_embedding_layers=with_embeddings
    )
    if unknown := [file_name for file_name, tensor in tensors.items() if id(tensor) not in names]:
        raise CannotTrain(
            f"The model has an adapter whose weight {unknown[0]!r} is not one of the model's own weights.",
            hint="Pass the base model without an adapter, and set lora.",
            param="model",
        )
    owned = {file_name: names[id(tensor)] for file_name, tensor in tensors.items()}
    return {file_name: canonical.get(own, own) for file_name, own in owned.items()}


def _saved_config(config: LoraConfig, base_model: str | None) -> dict[str, Any]:
    values = {  # peft stores names in sets; for mixture-of-experts models, some are empty
        name: sorted(cast("set[str]", value)) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
    }
    if base_model is not None:
        repository, _, revision = base_model.partition("@") if is_hub_id(base_model) else (base_model, "", "")
        values |= {"base_model_name_or_path": repository, "revision": revision or None}
    values["base_model_name_or_path"] = values["base_model_name_or_path"] or None
    return {**values, "inference_mode": True}


def _layers(model: nn.Module, adapter: str) -> dict[str, _Layer]:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    layers: dict[str, _Layer] = {}
    for name, part in model.named_modules():
        if isinstance(part, LoraLayer) and not isinstance(part, ParamWrapper) and adapter in part.scaling:
            embeds = isinstance(part.get_base_layer(), nn.Embedding)
            transposed = embeds or bool(getattr(part, "fan_in_fan_out", False))
            has_norms = adapter in part.lora_magnitude_vector
            norms = f"{name}.lora_magnitude_vector.{adapter}.weight" if has_norms else None
            layers[name] = _Layer(part.scaling[adapter], transposed, embeds, norms)
    return layers


def _stacks(model: nn.Module, adapter: str) -> dict[str, _Stack]:
    """The adapted parameters by the names of peft's wrappers, which are nested if a module has several of them."""
    from peft.tuners.lora.layer import ParamWrapper

    stacks: dict[str, _Stack] = {}
    for name, part in model.named_modules():
        if isinstance(part, ParamWrapper) and adapter in part.scaling:
            wrapper: Any = part
            stacks[name] = _Stack(
                _without_wrappers(f"{name}.{wrapper.parameter_name}"),
                wrapper.num_experts,
                wrapper.scaling[adapter],
                transposed=not wrapper._did_swap_in_out_features,
            )
    return stacks


def _without_wrappers(name: str) -> str:
    """The name of a weight without the part that each of peft's wrappers adds; wrappers may be nested."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
