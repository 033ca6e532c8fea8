"""LoRA through peft: choosing the layers of a model that get an adapter, and adding it.

The base is frozen and stays as it is; the adapters are trained in float32.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zeta_core.contract.spec.options import Lora
from zeta_core.failures import CannotTrain
from zeta_core.model.adapter import Adapter
from zeta_core.model.existing_adapter import adapter_weight_names, has_adapter
from zeta_core.model.inspection import is_output_layer, resized_embeddings
from zeta_core.optim.roles import Role, parameter_roles

ALL_LINEAR = "all-linear"
ALL_EXPERTS = "all-experts"
_ADAPTER = "default"  # peft's name for the only adapter of a model
_SAMPLED_VALUES = 1024  # of each weight, for the fingerprint of a base


@dataclass(frozen=True)
class _Saved:
    """The modules that are trained as a whole and saved with the adapter; ``keeps_tied`` if two share a weight."""

    names: list[str]
    keeps_tied: bool
    resized_to: int | None
    note: str | None


def add_adapter(model: nn.Module, lora: Lora, *, base_model: str | None, seed: int) -> Adapter:
    """Add adapters to ``model``, in place, and freeze everything else. Raises `CannotTrain`.

    They start with the same random numbers on every rank, and do not change the model's output before training.
    """
    if has_adapter(model):
        raise CannotTrain(
            "lora is set, but the model already has LoRA layers; pass the base model, or remove lora.", param="lora"
        )
    from peft import LoraConfig, inject_adapter_in_model

    saved = _modules_to_save(model, lora)
    chosen = _targets(model, lora.target_modules, saved.names)
    modules = dict(model.named_modules())
    config = LoraConfig(
        r=lora.r,
        lora_alpha=cast(int, int(lora.lora_alpha) if lora.lora_alpha == int(lora.lora_alpha) else lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=_shortest(chosen, modules),
        target_parameters=_parameters(model, lora.target_parameters, saved.names) or None,
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in chosen),
        modules_to_save=_shortest(saved.names, modules) if saved.names else None,
        ensure_weight_tying=saved.keeps_tied,
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    torch.manual_seed(seed)
    try:
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    except ValueError as error:  # for layers that peft cannot adapt, such as those that Mamba's kernels read
        raise CannotTrain(f"peft rejects lora.target_modules: {error}", param="lora.target_modules") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Adapter.of(model, _ADAPTER, config, base_model, resized_to=saved.resized_to, note=saved.note)


def modules_to_save(model: nn.Module, lora: Lora) -> list[str]:
    """The full names of the modules that are trained as a whole. Raises `CannotTrain`."""
    return _modules_to_save(model, lora).names


def target_parameters(model: nn.Module, lora: Lora) -> list[str]:
    """The full names of the parameters outside of linear layers that get an adapter. Raises `CannotTrain`."""
    return _parameters(model, lora.target_parameters, _modules_to_save(model, lora).names)


def base_fingerprint(model: nn.Module) -> str:
    """A hash of sampled values of every base weight: distinguishes bases, and is fast even for large ones."""
    digest = hashlib.sha256()
    adapter = adapter_weight_names(model)
    for name, parameter in model.named_parameters():
        if name in adapter:
            continue
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + some.tobytes())
    return digest.hexdigest()[:32]


def _targets(model: nn.Module, wanted: str | list[str], saved: Collection[str]) -> list[str]:
    """The full names of the layers to adapt. A string is a pattern for full names; a list contains their last parts.

    Modules in ``saved`` are trained as a whole, so no adapter is added inside them.
    """
    modules = {name: part for name, part in model.named_modules() if name}
    adaptable = {name: part for name, part in modules.items() if isinstance(part, nn.Linear | Conv1D | nn.Embedding)}
    if wanted == ALL_LINEAR:
        chosen = [
            name
            for name, part in adaptable.items()
            if not isinstance(part, nn.Embedding)
            and not is_output_layer(part, model)
            and not _is_inside(name, saved)
            # Llama 4's routers are linear layers that return two tensors, which LoRA layers can't add to.
            and not (type(part) is not nn.Linear and "router" in type(part).__name__.lower())
        ]
        if not chosen:
            raise _invalid_targets(f"lora.target_modules is {wanted!r}, but this model has no linear layer", adaptable)
        return chosen
    if isinstance(wanted, str):
        chosen = [name for name in modules if re.fullmatch(wanted, name)]
        if not chosen:
            raise _invalid_targets(
                f"lora.target_modules is {wanted!r}, which matches the full name of no layer", adaptable
            )
    else:
        matches = {last: [name for name in modules if name == last or name.endswith(f".{last}")] for last in wanted}
        if missing := [last for last, names in matches.items() if not names]:
            raise _invalid_targets(
                f"lora.target_modules names {missing[0]!r}, which is not in {type(model).__name__}", adaptable
            )
        chosen = list(dict.fromkeys(name for names in matches.values() for name in names))
    for name in chosen:
        if name not in adaptable:
            kind = type(modules[name]).__name__
            raise _invalid_targets(
                f"lora.target_modules names {name!r}, a {kind}, which LoRA does not adapt", adaptable
            )
        if _is_inside(name, saved):
            raise CannotTrain(
                f"lora.target_modules names {name!r}, which is trained as a whole (it is in lora.modules_to_save, or "
                "an embedding with added rows); remove it from lora.target_modules.",
                param="lora.target_modules",
            )
    _reject_tied(model, chosen, adaptable)
    return chosen


def _parameters(model: nn.Module, wanted: str | list[str], saved: Collection[str]) -> list[str]:
    """The full names of the parameters to adapt that are not weights of linear layers. Raises `CannotTrain`."""
    parts = dict(model.named_modules())
    stacked = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() in (2, 3)
        and not isinstance(parts[name.rpartition(".")[0]], nn.Linear | Conv1D | nn.Embedding)
    }
    if wanted == ALL_EXPERTS:
        roles = parameter_roles(model, [model])
        chosen = [name for name in stacked if roles[name] is Role.EXPERTS and not _is_inside(name, saved)]
        if not chosen:
            raise _invalid_parameters(f"is {wanted!r}, but {type(model).__name__} has no stacked experts", stacked)
        return chosen
    chosen = list[str]()
    for end in wanted:
        matches = [name for name in stacked if name == end or name.endswith(f".{end}")]
        if not matches:
            what = f"names {end!r}, but {type(model).__name__} has no such matrix outside of linear layers"
            raise _invalid_parameters(what, stacked)
        chosen += matches
    if inside := [name for name in chosen if _is_inside(name, saved)]:
        raise _invalid_parameters(f"names {inside[0]!r}, which is trained as a whole (lora.modules_to_save)", stacked)
    return list(dict.fromkeys(chosen))


def _invalid_parameters(what: str, stacked: Iterable[str]) -> CannotTrain:
    ends = sorted({".".join(name.split(".")[-3:]) for name in stacked})
    known = f"its matrices outside of linear layers are: {', '.join(ends[:20])}" if ends else "omit it"
    return CannotTrain(f"lora.target_parameters {what}; {known}.", param="lora.target_parameters")


def _is_inside(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _modules_to_save(model: nn.Module, lora: Lora) -> _Saved:
    """The modules that the spec names, and the embeddings if they were resized after the base was loaded."""
    modules = {name: part for name, part in model.named_modules(remove_duplicate=False) if name}
    chosen: list[str] = []
    for wanted in lora.modules_to_save:
        matches = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        if not matches:
            last = sorted({name.rpartition(".")[2] for name in modules})
            raise _not_saved(wanted, f"is not in {type(model).__name__}; its modules are: {', '.join(last[:30])}")
        for name in matches:
            no_weights = next(modules[name].parameters(), None) is None
            if no_weights or isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
                raise _not_saved(wanted, f"is a {type(modules[name]).__name__}, which cannot be trained as a whole")
        chosen += matches
    note, resized = None, resized_embeddings(model)
    if resized is not None:
        ends = [name for name, part in modules.items() if part is _input(model) or is_output_layer(part, model)]
        chosen += ends
        note = (
            f"The embeddings have {resized.rows} rows, and those of the base have {resized.before}: "
            f"{' and '.join(ends)} are trained as a whole and saved with the adapter, as with lora.modules_to_save."
        )
    chosen = list(dict.fromkeys(chosen))
    shared = _with_shared_weights(modules)
    tied = [name for name in chosen if shared.get(name)]
    ends = {id(_input(model)), id(_output(model))}
    for name in tied:
        if id(modules[name]) not in ends or not any(id(modules[other]) in ends for other in shared[name]):
            raise _not_saved(name, f"shares its weight with {shared[name][0]!r}, and peft cannot keep them tied")
    chosen = list(dict.fromkeys([*chosen, *(other for name in tied for other in shared[name])]))
    return _Saved(chosen, bool(tied), None if resized is None else resized.rows, note)


def _with_shared_weights(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The names of modules -> those of other modules with the same weight."""
    owners: dict[int, list[str]] = {}
    for name, part in modules.items():
        if (weight := _own_weight(part)) is not None:
            owners.setdefault(id(weight), []).append(name)
    return {name: [other for other in names if other != name] for names in owners.values() for name in names}


def _own_weight(part: nn.Module) -> nn.Parameter | None:
    """The parameter ``weight``; None for quantized layers, whose weight is computed in each access."""
    return dict(part.named_parameters(recurse=False)).get("weight")


def _input(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    return cast("nn.Module | None", getter()) if callable(getter) else None


def _output(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return cast("nn.Module | None", getter()) if callable(getter) else None


def _not_saved(name: str, why: str) -> CannotTrain:
    return CannotTrain(f"lora.modules_to_save names {name!r}, which {why}.", param="lora.modules_to_save")


def _reject_tied(model: nn.Module, chosen: Iterable[str], adaptable: Mapping[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for name, part in model.named_modules(remove_duplicate=False):
        if name in adaptable and (weight := _own_weight(part)) is not None:
            owners.setdefault(id(weight), []).append(name)
    for name in chosen:
        weight = _own_weight(adaptable[name])
        others = [] if weight is None else [other for other in owners[id(weight)] if other != name]
        if others:
            raise _invalid_targets(
                f"lora.target_modules names {name!r}, which shares its weight with {others[0]!r}", adaptable
            )


def _invalid_targets(what: str, adaptable: Mapping[str, nn.Module]) -> CannotTrain:
    last = sorted({name.rpartition(".")[2] for name in adaptable})
    return CannotTrain(
        f"{what}; its linear layers and embeddings are: {', '.join(last[:20])}. Name some of them, or use "
        f"{ALL_LINEAR!r}.",
        param="lora.target_modules",
    )


def _shortest(chosen: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The last parts of the names, as people write them, if they select the same layers; otherwise, the full names."""
    last = sorted({name.rpartition(".")[2] for name in chosen})
    selected = {name for name in modules if any(name == part or name.endswith(f".{part}") for part in last)}
    return last if selected == set(chosen) else sorted(chosen)
