"""Training a stored adapter further: its base with the adapter in it, instead of the adapter merged into its base."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from pydantic import ValidationError
from torch import nn

from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.options import ADAPTER_SETTINGS, Lora
from zeta_core.failures import CannotTrain, InvalidModel
from zeta_core.model.adapter_checkpoint import AdapterCheckpoint
from zeta_core.model.located_model import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LocatedModel

_PARAM = "lora.continue_adapter"


def continued(located: LocatedModel, options: TrainerOptions) -> LocatedModel:
    """The model that trains the located adapter further.

    Raises `CannotTrain` if the model is not an adapter in files, or if the options don't support it, and `InvalidModel`
    if its settings are not supported.
    """
    if located.continue_adapter is None:
        raise CannotTrain(
            f"{_PARAM} is true, but {located.name} is not an adapter that is stored in files.",
            hint=f"Omit {_PARAM} to train a new adapter on this model.",
            param=_PARAM,
        )
    return located.continue_adapter(options)


def continue_adapter(adapter: AdapterCheckpoint, base: LocatedModel, options: TrainerOptions) -> LocatedModel:
    """``base`` with ``adapter`` in it; only the adapter is trained. Raises as `continued` does."""
    settings = _settings(adapter)
    _check(adapter, settings, options)

    def adding(build_base: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        add = _with_weights if adapter.has_weights else _without_weights
        return lambda: add(adapter, build_base)

    return replace(
        base,
        build=adding(base.build),
        name=adapter.name,
        directory=adapter.directory,  # the tokenizer is there, too
        build_mapped=None if base.build_mapped is None else adding(base.build_mapped),
        build_exact=None if base.build_exact is None else adding(base.build_exact),
        build_adapted=None,
        continue_adapter=None,
        continued_settings=settings,
    )


def _settings(adapter: AdapterCheckpoint) -> dict[str, Any]:
    """The values of `ADAPTER_SETTINGS` in the adapter's configuration."""
    config = cast("dict[str, Any]", json.loads((adapter.directory / ADAPTER_CONFIG).read_bytes()))
    found = {name: config[name] for name in ADAPTER_SETTINGS if config.get(name) is not None}
    try:
        return Lora.model_validate(found, strict=False).model_dump(include=set(found))
    except ValidationError as error:
        fault = error.errors()[0]
        raise InvalidModel(
            f"The adapter {adapter.name} can't be continued, because its {fault['loc'][0]} is not supported: "
            f"{fault['msg']}."
        ) from error


def _check(adapter: AdapterCheckpoint, settings: dict[str, Any], options: TrainerOptions) -> None:
    """Apply the rules for a new adapter with these settings."""
    assert options.lora is not None, "continue_adapter is a setting of lora"
    own = options.lora.model_copy(update={**settings, "continue_adapter": False})
    faults = options.model_copy(update={"lora": own}).faults()
    if faults:
        raise CannotTrain(
            f"The adapter {adapter.name} can't be continued with these options: {faults[0].message}",
            param=faults[0].param,
        )


def _with_weights(adapter: AdapterCheckpoint, build_base: Callable[[], nn.Module]) -> nn.Module:
    model: Any = adapter.added_to(build_base())
    model.peft_config["default"].inference_mode = False
    model.set_adapter("default")  # lets its weights require gradients
    return model.get_base_model()


def _without_weights(adapter: AdapterCheckpoint, build_base: Callable[[], nn.Module]) -> nn.Module:
    """The base with adapter layers of the stored shapes, for an estimate."""
    from peft import LoraConfig, inject_adapter_in_model

    base = build_base()
    if (adapter.directory / ADAPTER_WEIGHTS).is_file():
        adapter.resize_embeddings(base)
    config: Any = LoraConfig.from_pretrained(str(adapter.directory), local_files_only=True)
    config.inference_mode = False
    return inject_adapter_in_model(config, base)
