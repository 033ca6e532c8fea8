"""Training an adapter that the model already has, from peft's ``get_peft_model`` or transformers' ``add_adapter``.

One trainable LoRA adapter is trained and saved as a LoRA checkpoint. All other cases are rejected before the first
step, because their checkpoint could not be loaded again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from zeta_core.failures import CannotTrain
from zeta_core.model.adapter import Adapter, adapter_files
from zeta_core.model.inspection import is_output_layer, resized_embeddings

if TYPE_CHECKING:
    from peft import LoraConfig

_INSTEAD = "Pass the base model without an adapter, and set lora."


def without_peft_wrapper(model: nn.Module) -> nn.Module:
    """The adapted model inside a wrapper of peft, which shares its modules. Other models are returned unchanged.

    Raises `CannotTrain` for a method that is not LoRA.
    """
    if not _peft_is_loaded():
        return model
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(model, PeftMixedModel):
        raise _rejected("combines several peft methods, and only LoRA adapters are trained here")
    if isinstance(model, PeftModel):
        for config in cast("dict[str, Any]", model.peft_config).values():
            _check_method(config)
        return model.get_base_model()
    if isinstance(model, BaseTuner):
        if not isinstance(model, LoraModel):
            raise _rejected(f"is a {type(model).__name__}, and only LoRA adapters are trained here")
        return cast(nn.Module, model.model)
    return model


def has_adapter(model: nn.Module) -> bool:
    """Whether modules of peft are part of the model."""
    return any(True for _ in _adapter_layers(model))


def disable_adapters(model: nn.Module) -> nn.Module:
    """Let the model compute as its base, without the adapters in it. Returns the model."""
    for part in _adapter_layers(model):
        part.enable_adapters(False)
    return model


def existing_adapter(model: nn.Module, base_model: str | None) -> Adapter | None:
    """The adapter of the model, or None if it has none. Raises `CannotTrain` if it can't be trained or saved alone."""
    if not has_adapter(model):
        return None
    configs = cast("dict[str, Any]", getattr(model, "peft_config", None) or {})
    for config in configs.values():
        _check_method(config)
    if len(configs) != 1:
        named = f" ({', '.join(map(repr, configs))})" if configs else ""
        raise _rejected(
            f"has {len(configs) or 'unnamed'} adapters{named}, and only one can be trained and saved",
            "Merge the others into the model, or remove them with delete_adapter.",
        )
    [(name, config)] = configs.items()
    from peft.utils.other import AuxiliaryTrainingWrapper

    resized, note = resized_embeddings(model), None
    embeddings = _input_embeddings(model)
    if resized is not None and embeddings is not None and not isinstance(embeddings, AuxiliaryTrainingWrapper):
        note = (
            f"The embeddings have {resized.rows} rows, and those of the base have {resized.before}. They are saved "
            "with the adapter, but not trained; to train them, name them in the modules_to_save of the LoraConfig."
        )
    adapter = Adapter.of(
        model,
        name,
        cast("LoraConfig", config),
        base_model,
        resized_to=None if resized is None else resized.rows,
        note=note,
        with_embeddings=note is not None,
    )
    _check_state(model, name, adapter)
    return adapter


def _input_embeddings(model: nn.Module) -> object:
    getter = getattr(model, "get_input_embeddings", None)
    return getter() if callable(getter) else None


def adapter_weight_names(model: nn.Module) -> frozenset[str]:
    """The names of the weights of all adapters in the model; they are not part of the base."""
    if not has_adapter(model):
        return frozenset()
    configs = cast("dict[str, Any]", getattr(model, "peft_config", None) or {})
    return frozenset(own for name in configs for own in adapter_files(model, name).values())


def parts_of_adapter(model: nn.Module) -> list[str]:
    """The names of the modules that an adapter has added or trains as a whole, and of an adapted output layer."""
    if not _peft_is_loaded():
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    parts = list[str]()
    for name, part in model.named_modules():
        if isinstance(part, AuxiliaryTrainingWrapper) or is_output_layer(part, model):
            parts.append(name)
        elif isinstance(part, BaseTunerLayer):
            layer = cast(nn.Module, part)
            parts += [f"{name}.{child}" for child, _ in layer.named_children() if child != "base_layer"]
    return parts


def _check_method(config: Any) -> None:
    from peft import LoraConfig

    method = getattr(config.peft_type, "value", config.peft_type)
    if not isinstance(config, LoraConfig) or method != "LORA":
        raise _rejected(f"has an adapter of the peft method {method}, and only LoRA adapters are trained here")


def _check_state(model: nn.Module, name: str, adapter: Adapter) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for part in _adapter_layers(model):
        if part.disable_adapters or name not in part.active_adapters:
            raise _rejected(
                f"has the adapter {name!r}, but it is not active", f"Activate it with set_adapter({name!r})."
            )
        if isinstance(part, BaseTunerLayer) and part.merged:
            raise _rejected(f"has the adapter {name!r}, but it is merged", "Call unmerge_adapter first.")
    trained = {own for own, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained & adapter.names:
        raise _rejected(
            f"has the adapter {name!r}, but its weights do not require gradients",
            f"Load it with is_trainable=True, or call set_adapter({name!r}).",
        )
    if others := sorted(trained - adapter.names):
        raise _rejected(
            f"has the adapter {name!r}, but {len(others)} other parameters require gradients, too, including "
            f"{others[0]}; an adapter's checkpoint would not contain them",
            "Freeze them, or name their modules in the modules_to_save of its LoraConfig.",
        )


def _peft_is_loaded() -> bool:
    """Whether a model can have an adapter. Only peft makes them, and importing it takes seconds."""
    return "peft" in sys.modules


def _adapter_layers(model: nn.Module) -> Iterator[Any]:
    if not _peft_is_loaded():
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for part in model.modules():
        if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield part


def _rejected(what: str, fix: str | None = None) -> CannotTrain:
    """The model has an adapter that is not trained here; ``fix`` is better than using ``lora`` instead."""
    hint = _INSTEAD if fix is None else f"{fix} Or pass the base model without an adapter, and set lora."
    return CannotTrain(f"The model {what}.", hint=hint, param="model")
