"""Choosing the trainable parameters of a model, and the weights that a checkpoint contains."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zeta_core.checkpoint.weights import SavedWeights, unique_weights
from zeta_core.contract.spec.options import Lora, Quantization
from zeta_core.failures import CannotTrain
from zeta_core.model.adapter import Adapter
from zeta_core.model.existing_adapter import adapter_weight_names, existing_adapter, parts_of_adapter
from zeta_core.model.export import Exporter
from zeta_core.model.freezing import freeze
from zeta_core.model.located_model import LocatedModel
from zeta_core.model.lora import add_adapter, modules_to_save
from zeta_core.model.quantization import is_quantized, quantize, quantize_experts
from zeta_core.model.skeleton import build_skeleton
from zeta_core.model.special_tokens import SpecialTokens
from zeta_core.plan import Plan

_COMPUTED_IN = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare_model(
    model: nn.Module,
    located: LocatedModel,
    plan: Plan,
    tokenizer: Any,
    tokens: SpecialTokens | None,
    *,
    merge: bool,
    defers: bool = False,
) -> tuple[SavedWeights, Exporter]:
    """`prepare` the model, and return the weights to save and how to export them.

    ``tokens`` are set in the saved configurations. With ``merge``, the merged model is exported as well, which requires
    the original weights of a quantized base. ``defers`` is that of `prepare`.
    """
    dtype = _stored_precision(model, located)
    skeleton = build_skeleton(model, dtype, tokens)
    keep = merge and plan.lora is not None and plan.lora["quantize"] is not None
    own = adapter_weight_names(model)  # of a continued adapter, which is trained
    base_weights = {name: tensor for name, tensor in model.state_dict().items() if name not in own} if keep else {}
    kept, aliases_of_kept = unique_weights(base_weights)
    adapter = prepare(model, located, plan, defers=defers)
    export = Exporter(skeleton, tokenizer, dtype, located, adapter)
    weights, aliases = unique_weights(model.state_dict())
    if adapter is None:
        saved = SavedWeights(frozenset(weights), aliases)
    elif keep:
        saved = SavedWeights(adapter.names, aliases_of_kept, whole=adapter.names | kept.keys(), base_weights=kept)
    else:
        saved = SavedWeights(adapter.names, aliases, whole=frozenset(weights) if merge else None)
    return saved, export


def prepare(model: nn.Module, located: LocatedModel, plan: Plan, *, defers: bool = False) -> Adapter | None:
    """Add the adapter, or freeze the parameters that are not trained, in place. Raises `CannotTrain`.

    Trained parameters are in `trained_precision`, whatever their stored precision. The base of an adapter keeps its
    stored precision if the run computes in it, and is otherwise in float32; with ``lora.quantize``, its linear layers
    are in 4 bits. Buffers keep their precision, because rotary frequencies in half precision would give distant tokens
    wrong positions. With ``defers``, weights that are all trained keep their stored precision here; the engine converts
    them when it reads them.
    """
    loaded = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    if loaded or any(is_quantized(parameter) for parameter in model.parameters()):
        raise CannotTrain(
            f"The weights of this {type(model).__name__} are already quantized; load it without a quantization_config, "
            "and set lora.quantize to train on a 4-bit base.",
            param="model",
        )
    lora = None if plan.lora is None else Lora(**plan.lora)
    if lora is None:
        existing = existing_adapter(model, located.base_model)
        if existing is None:
            _to_float(model, parameters=None if defers else trained_precision(plan))
        else:
            _to_precision(model, located, plan, trained=existing.names)
        freeze(model, plan.freeze)
        return existing
    quantization = None
    if lora.quantize is not None:
        quantization = _Quantization(lora.quantize, _COMPUTED_IN[plan.mixed_precision], _device(), deferred=defers)
    if lora.continue_adapter:
        adapter = existing_adapter(model, located.base_model)
        assert adapter is not None, "the model is an adapter"
        if quantization is not None:
            quantization.apply_to_layers(model, keep=parts_of_adapter(model))
        _to_precision(model, located, plan, trained=adapter.names)
    else:
        if quantization is not None:
            quantization.apply_to_layers(model, keep=modules_to_save(model, lora))
        _to_precision(model, located, plan)
        adapter = add_adapter(model, lora, base_model=located.base_model, seed=plan.seed)
    if quantization is not None:
        quantization.apply_to_experts(model)
    return adapter


@dataclass(frozen=True)
class _Quantization:
    """How the base of an adapter is quantized; see `zeta_core.model.quantization`."""

    kind: Quantization
    dtype: torch.dtype
    device: torch.device
    deferred: bool

    def apply_to_layers(self, model: nn.Module, *, keep: Collection[str]) -> None:
        quantize(model, self.kind, self.dtype, self.device, keep=keep, deferred=self.deferred)

    def apply_to_experts(self, model: nn.Module) -> None:
        """Quantize stacked experts, after the adapter was added."""
        if self.kind == "nf4-experts":
            kept = parts_of_adapter(model)
            quantize_experts(model, self.dtype, self.device, keep=kept, deferred=self.deferred)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def trained_precision(plan: Plan) -> torch.dtype:
    """The precision of trained weights."""
    return torch.float32 if plan.bf16_weights is None else torch.bfloat16


def _to_float(model: nn.Module, *, parameters: torch.dtype | None) -> None:
    """Convert the buffers to float32 and the ``parameters`` to this type; None keeps theirs."""
    if parameters == torch.float32:
        model.float()
        return
    for parameter in model.parameters() if parameters is not None else ():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(parameters)
    for part in model.modules():
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
            if buffer.is_floating_point():
                setattr(part, name, buffer.float())


def _to_precision(model: nn.Module, located: LocatedModel, plan: Plan, *, trained: Collection[str] = ()) -> None:
    """The frozen base in its stored precision if the run computes in it; the ``trained`` parameters in float32."""
    stored_in, computed_in = _stored_precision(model, located), _COMPUTED_IN[plan.mixed_precision]
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            keeps = stored_in == computed_in and name not in trained
            parameter.data = parameter.data.to(stored_in if keeps else torch.float32)


def _stored_precision(model: nn.Module, located: LocatedModel) -> torch.dtype:
    return located.dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
