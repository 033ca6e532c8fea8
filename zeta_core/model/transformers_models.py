"""Building models with transformers: from a config, or from a directory with a config and weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT
from zeta_core.contract.spec.validation import shown
from zeta_core.contract.wire.run_directory import MANIFEST_NAME
from zeta_core.data.sources import SourceLocations
from zeta_core.failures import InvalidModel
from zeta_core.model.folders import lfs_pointer_fault
from zeta_core.model.located_model import LocatedModel
from zeta_core.model.stored_precision import stored_precision


def model_from_config(config: dict[str, Any]) -> LocatedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise InvalidModel("model.config has no model_type; name the architecture, such as 'llama'.")
    try:
        resolved = AutoConfig.for_model(model_type, **values)
    except Exception as error:
        raise InvalidModel(_config_fault(model_type, values, error)) from error
    if getattr(resolved, "auto_map", None):  # possible in a config object from a script
        raise InvalidModel("model.config has an auto_map; custom model code never runs here, so remove it.")

    def build() -> object:
        return AutoModelForCausalLM.from_config(resolved, dtype=torch.float32)

    return LocatedModel(lambda: build_module(build), model_type)


_FIELD_ERROR = re.compile(r"Validation error for field '(?P<name>\w+)':\s+\w+: Field '\w+' expected (?P<type>\w+)")
_TYPES = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "list": "a list"}


def _config_fault(model_type: str, values: dict[str, Any], error: Exception) -> str:
    """One sentence about a config that transformers rejects, which reports a field or a rule in several lines."""
    text = str(error)
    field = _FIELD_ERROR.match(text)
    if field is not None and field["name"] in values:
        name, expected = field["name"], _TYPES.get(field["type"], f"of type {field['type']}")
        return f"model.config.{name} is {shown(values[name])}; it must be {expected}."
    reason = re.sub(r"^Class validation error[^\n]*\n\s*\w+: ", "", text).replace("\n", " ")
    return f"model.config is not a valid {model_type} config: {reason[:300].rstrip('.')}; correct it."


def model_from_directory(
    directory: Path, name: str, locations: SourceLocations, *, base_model: str | None = None
) -> LocatedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (directory / "config.json").is_file():
        fix = "name the directory of a Hugging Face causal language model"
        if (directory / FINAL_CHECKPOINT / MANIFEST_NAME).is_file():
            fix = f"name one of the checkpoints in it, such as {name.rstrip('/')}/{FINAL_CHECKPOINT}"
        elif (directory / MANIFEST_NAME).is_file():
            fix = "it contains the weights of a custom module; load them in your own code and pass the module"
        raise InvalidModel(f"{name} has no config.json; {fix}.")
    stored = any((directory / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json"))
    if locations.fetch_weights and not stored:
        raise InvalidModel(
            f"{name} has no model.safetensors; save it with save_pretrained (pickled weights are not read)."
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = str(error).replace(str(directory), name)  # hide the worker's path
        raise InvalidModel(f"The config of {name} cannot be read: {reason[:300]}") from error
    quantized_by = cast("dict[str, Any]", getattr(config, "quantization_config", None) or {}).get("quant_method")
    if quantized_by == "bitsandbytes":
        raise InvalidModel(
            f"The weights of {name} are already quantized by bitsandbytes; name the original model, and set "
            "lora.quantize to train on a 4-bit base."
        )
    dtype = getattr(config, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else None

    def build() -> nn.Module:
        if locations.fetch_weights:
            return load_directory(directory, name)
        return build_module(lambda: cast(object, AutoModelForCausalLM.from_config(config, dtype=torch.float32)))

    build_mapped = partial(load_directory, directory, name, "auto") if locations.fetch_weights else None
    precision = stored_precision(directory) if locations.fetch_weights else None
    build_exact = None if precision is None else partial(load_directory, directory, name, precision)
    return LocatedModel(
        build,
        name,
        directory,
        base_model,
        pretrained=True,
        dtype=dtype or torch.float32,
        build_mapped=build_mapped,
        build_exact=build_exact,
    )


def load_directory(directory: Path, name: str, dtype: torch.dtype | Literal["auto"] = torch.float32) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise InvalidModel(
            f"The model {name} {lfs_pointer_fault(directory) or f'cannot be loaded: {error}'}"
        ) from error
    model, loading_info = loaded
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise InvalidModel(f"The weights of {name} lack {len(missing)} tensors, including {missing[0]}.")
    return cast(nn.Module, model)


def build_module(build: Callable[[], object]) -> nn.Module:
    try:
        model = build()
    except Exception as error:
        raise InvalidModel(f"The model cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InvalidModel(f"The builder returned {type(model).__name__}, not an nn.Module.")
    return model
