"""LoRA through peft: adapters put into a model, and what is written of them for others to load.

The base is frozen and stays as it is; the adapters are trained in float32. peft's layers take the place of the adapted
ones inside the model, so it is called, wrapped and sharded as before. Its names have ``.base_layer`` and ``lora_...``
in them, and those of the files are peft's: ``base_model.model.<layer>.lora_A.weight``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from zeta_core.checkpoint.state import Tensors
from zeta_core.contract.identifiers import is_hub_id
from zeta_core.contract.spec import Lora
from zeta_core.failures import CannotTrain
from zeta_core.model.facts import gives_logits
from zeta_core.model.sources import ADAPTER_CONFIG

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
_ADAPTER = "default"  # peft's name for the only adapter of a model
_SAMPLED_VALUES = 1024  # of each weight, for the fingerprint of a base


@dataclass(frozen=True)
class _Layer:
    """How an adapter changes the weight of its layer: by ``scaling`` times B A, or its transpose."""

    scaling: float
    transposed: bool
    embeds: bool


@dataclass(frozen=True)
class Adapter:
    """The adapter of a model: its weights by the model's own names, and how it is written and merged."""

    names: frozenset[str]
    _config: dict[str, Any]
    _layers: Mapping[str, _Layer]

    def write(self, folder: Path, weights: Tensors) -> None:
        """Write ``weights`` and the config in peft's layout."""
        own = {f"base_model.model.{_without_adapter(name)}": weights[name] for name in sorted(self.names)}
        save_file(own, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(self._config, indent=2, sort_keys=True) + "\n")

    def base_name(self, name: str) -> str:
        """What the base itself calls a weight of the adapted model."""
        return name.replace(".base_layer.", ".")

    def merged(self, weights: Tensors) -> Tensors:
        """The whole model's weights under the base's names, the adapter added to them in float32."""
        merged = {self.base_name(name): tensor for name, tensor in weights.items() if name not in self.names}
        for place, layer in self._layers.items():
            a, b = (
                (f"{place}.lora_embedding_{x}.{_ADAPTER}" for x in "AB")
                if layer.embeds
                else (f"{place}.lora_{x}.{_ADAPTER}.weight" for x in "AB")
            )
            change = weights[b].float() @ weights[a].float() * layer.scaling
            name = f"{place}.weight"
            merged[name] = merged[name].float() + (change.T if layer.transposed else change)
        return merged


def add_adapter(model: nn.Module, lora: Lora, *, base_model: str | None, seed: int) -> Adapter:
    """Put adapters into ``model``, in place, and freeze everything else. Raises `CannotTrain`.

    They start as the same random numbers on every rank, and so that the model's answers are the base's.
    """
    if any(isinstance(part, LoraLayer) for part in model.modules()):
        raise CannotTrain("lora is given, but the model has LoRA layers already; leave one of them out.", param="lora")
    chosen = _targets(model, lora.target_modules)
    repository, revision = base_model, ""
    if base_model is not None and is_hub_id(base_model):
        repository, _, revision = base_model.partition("@")
    modules = dict(model.named_modules())
    config = LoraConfig(
        r=lora.r,
        lora_alpha=cast(int, int(lora.lora_alpha) if lora.lora_alpha == int(lora.lora_alpha) else lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        target_modules=_shortest(chosen, modules),
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in chosen),
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        base_model_name_or_path=repository,
        revision=revision or None,
    )
    torch.manual_seed(seed)
    try:
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    except ValueError as error:  # peft knows layers that it cannot adapt, such as those that Mamba's kernels read
        raise CannotTrain(f"peft refuses lora.target_modules: {error}", param="lora.target_modules") from error
    names: set[str] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            names.add(name)
    layers: dict[str, _Layer] = {}
    for name, part in model.named_modules():
        if isinstance(part, LoraLayer):
            embeds = isinstance(part.get_base_layer(), nn.Embedding)
            transposed = embeds or bool(getattr(part, "fan_in_fan_out", False))
            layers[name] = _Layer(part.scaling[_ADAPTER], transposed, embeds)
    # peft holds names in sets, for models of experts also empty ones.
    written = {
        name: sorted(cast("set[str]", value)) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
    }
    return Adapter(frozenset(names), {**written, "inference_mode": True}, layers)


def base_fingerprint(model: nn.Module) -> str:
    """A hash of some values of every weight: tells one base from another, in a moment even for a large one."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + some.tobytes())
    return digest.hexdigest()[:32]


def _targets(model: nn.Module, wanted: str | list[str]) -> list[str]:
    """The full names of the layers to adapt. A string is a pattern of whole names, a list has their last parts."""
    modules = {name: part for name, part in model.named_modules() if name}
    able = {name: part for name, part in modules.items() if isinstance(part, nn.Linear | Conv1D | nn.Embedding)}
    if wanted == ALL_LINEAR:
        chosen = [
            name for name, part in able.items() if not isinstance(part, nn.Embedding) and not gives_logits(part, model)
        ]
        if not chosen:
            raise _refused(f"lora.target_modules is {wanted!r}, but this model has no linear layer", able)
        return chosen
    if isinstance(wanted, str):
        chosen = [name for name in modules if re.fullmatch(wanted, name)]
        if not chosen:
            raise _refused(f"lora.target_modules is {wanted!r}, which is the whole name of no layer", able)
    else:
        found = {last: [name for name in modules if name == last or name.endswith(f".{last}")] for last in wanted}
        if missing := [last for last, names in found.items() if not names]:
            raise _refused(f"lora.target_modules names {missing[0]!r}, which is not in {type(model).__name__}", able)
        chosen = list(dict.fromkeys(name for names in found.values() for name in names))
    for name in chosen:
        if name not in able:
            kind = type(modules[name]).__name__
            raise _refused(f"lora.target_modules names {name!r}, a {kind}, which LoRA does not adapt", able)
    _refuse_tied(model, chosen, able)
    return chosen


def _refuse_tied(model: nn.Module, chosen: Iterable[str], able: Mapping[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for name, part in model.named_modules(remove_duplicate=False):
        if name in able:
            owners.setdefault(id(part.weight), []).append(name)
    for name in chosen:
        others = [other for other in owners[id(able[name].weight)] if other != name]
        if others:
            raise _refused(f"lora.target_modules names {name!r}, whose weight is also that of {others[0]!r}", able)


def _refused(what: str, able: Mapping[str, nn.Module]) -> CannotTrain:
    last = sorted({name.rpartition(".")[2] for name in able})
    return CannotTrain(
        f"{what}; its linear layers and embeddings are: {', '.join(last[:20])}. Name some of them, or use "
        f"{ALL_LINEAR!r}.",
        param="lora.target_modules",
    )


def _shortest(chosen: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The last parts of the names where they mean the same layers, as people write them; else the whole names."""
    last = sorted({name.rpartition(".")[2] for name in chosen})
    meant = {name for name in modules if any(name == part or name.endswith(f".{part}") for part in last)}
    return last if meant == set(chosen) else sorted(chosen)


def _without_adapter(name: str) -> str:
    return name.replace(f".{_ADAPTER}.", ".").removesuffix(f".{_ADAPTER}")
