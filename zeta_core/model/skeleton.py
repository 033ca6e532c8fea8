"""The Hugging Face model without storage, used to write checkpoints, and its configuration files.

Guarantees: `build_skeleton` returns configurations that can be saved and loaded again, or raises before the first step.
The caller's model and its configurations are not changed.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from zeta_core.failures import CannotTrain
from zeta_core.model.located_model import GENERATION_CONFIG
from zeta_core.model.special_tokens import SpecialTokens
from zeta_core.report.library_noise import without_progress_bars

# Attributes of a loaded model that change how `save_pretrained` obtains its weights: placement, quantization, adapters.
_NOT_COPIED = ("hf_device_map", "hf_quantizer", "peft_config", "_hf_peft_config_loaded", "_weight_conversions")


@dataclass(frozen=True)
class Skeleton:
    """A model with parameters on the meta device, and its generation config.

    ``notes`` describe the repairs of its configurations, and ``changed_end`` another end token of generation.
    """

    model: Any
    generation: Any  # None if the model does not generate
    notes: tuple[str, ...] = ()
    changed_end: str | None = None

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """Write weights and configurations."""
        with without_progress_bars():
            self.model.save_pretrained(folder, state_dict=dict(weights))
        self.save_generation_config(folder)

    def save_generation_config(self, folder: Path) -> None:
        """Write the generation config without the validation of transformers, which rejects ignored settings."""
        if self.generation is not None:
            self.generation.to_json_file(folder / GENERATION_CONFIG, use_diff=True, keys_to_pop=["compile_config"])


def build_skeleton(model: nn.Module, dtype: torch.dtype, tokens: SpecialTokens | None = None) -> Skeleton | None:
    """The skeleton of a Hugging Face model, or None for a plain module. Raises `CannotTrain`.

    ``tokens`` are set in its configurations; without them, those of the model are kept. The module tree is copied
    instead of built from the config, because a subclass may need more arguments.
    """
    from transformers import GenerationConfig, PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    copied: Any = _without_storage(model, dtype, {})
    for name in _NOT_COPIED:
        copied.__dict__.pop(name, None)
    notes: list[str] = []
    copied.config = _plain_config(model.config, "model.config", notes)
    if getattr(copied.config, "use_cache", None) is not None:
        copied.config.use_cache = True
    generation = None
    if copied.can_generate():
        generation = copy.copy(model.generation_config)
        _move_generation_settings(copied.config, generation, notes)
        generation = _loadable(generation, notes)
        copied.generation_config = GenerationConfig()  # `Skeleton.save` replaces its file
    changed_end = None if tokens is None or generation is None else tokens.apply(copied.config, generation)
    skeleton = Skeleton(copied, generation, tuple(notes), changed_end)
    _rehearse(skeleton)
    return skeleton


def _rehearse(skeleton: Skeleton) -> None:
    """Save everything but the weights to a temporary folder. Raises `CannotTrain`."""
    with tempfile.TemporaryDirectory(prefix="zeta-") as folder:
        try:
            skeleton.save(Path(folder), {})
        except Exception as error:
            config = skeleton.model.config
            raise CannotTrain(
                f"{_not_json(config) or f'This {type(skeleton.model).__name__}'} cannot be saved: "
                f"{str(error).strip():.400}",
                hint="Change it so that model.save_pretrained works; nothing was trained yet.",
                param="model",
            ) from error


def _not_json(config: Any) -> str | None:
    """The first value of a config that JSON cannot represent."""
    for name in _saved_names(config):
        value = vars(config)[name]
        try:
            json.dumps(value, default=lambda part: None if hasattr(part, "to_dict") else _reject(part))
        except (TypeError, ValueError):
            return f"model.config.{name}, which is {value!r:.100},"
    return None


def _reject(value: object) -> None:
    raise TypeError(type(value).__name__)


def _without_storage(module: nn.Module, dtype: torch.dtype, copies: dict[int, Any]) -> nn.Module:
    """A copy of the module tree with parameters and buffers on the meta device; other attributes are shared."""
    if id(module) in copies:
        return copies[id(module)]
    copied = type(module).__new__(type(module))
    copies[id(module)] = copied
    values = dict(vars(module))
    for kind in ("_parameters", "_buffers"):
        values[kind] = {name: _meta(tensor, dtype, copies) for name, tensor in values[kind].items()}
    values["_modules"] = {
        name: None if part is None else _without_storage(part, dtype, copies)
        for name, part in values["_modules"].items()
    }
    copied.__dict__.update(values)
    return copied


def _meta(tensor: torch.Tensor | None, dtype: torch.dtype, copies: dict[int, Any]) -> torch.Tensor | None:
    if tensor is None:
        return None
    if id(tensor) not in copies:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=kind, device="meta")
        copies[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copies[id(tensor)]


# --- Configurations ---------------------------------------------------------------------------------------------------


def _plain_config(config: Any, name: str, notes: list[str]) -> Any:
    """A copy of a config, in which values that JSON cannot represent are replaced by similar ones."""
    copied = copy.copy(config)
    for key in _saved_names(config):
        copied.__dict__[key] = _plain(vars(config)[key], f"{name}.{key}", notes)
    return copied


def _saved_names(config: Any) -> list[str]:
    """The attributes of a config that transformers saves; others are internal, such as those of its validation."""
    try:
        saved = config.to_dict()
    except Exception:  # noqa: BLE001 - it copies any value; if one cannot be copied, saving the config fails, too
        saved = vars(config)
    return [name for name in vars(config) if name in saved]


def _plain(value: Any, name: str, notes: list[str]) -> Any:
    from transformers import PreTrainedConfig

    match value:
        case PreTrainedConfig():
            return _plain_config(value, name, notes)
        case dict():
            entries = cast("dict[Any, Any]", value)
            return {key: _plain(item, f"{name}.{key}", notes) for key, item in entries.items()}
        case list():
            return [_plain(item, name, notes) for item in cast("list[Any]", value)]
        case tuple():
            return tuple(_plain(item, name, notes) for item in cast("tuple[Any, ...]", value))
        case str() | int() | float() | None:
            return value
        case _ if name.endswith(".dtype"):
            return value  # transformers writes its name
        case _:
            convert = next((function for kind, function in _CONVERTED.items() if isinstance(value, kind)), None)
    if convert is None:
        return value
    converted = convert(value)
    notes.append(f"{name} is a {type(value).__name__}, which JSON cannot represent; it is saved as {converted!r:.100}.")
    return _plain(converted, name, notes)


def _sorted(values: Iterable[Any]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:  # of different types
        return sorted(values, key=repr)


_CONVERTED: dict[type | tuple[type, ...], Callable[[Any], Any]] = {
    (set, frozenset): _sorted,
    torch.Tensor: lambda tensor: tensor.tolist(),
    np.ndarray: lambda array: array.tolist(),
    np.generic: lambda number: number.item(),
    torch.dtype: lambda dtype: str(dtype).removeprefix("torch."),
    PurePath: str,
    Enum: lambda member: member.value,
}


def _move_generation_settings(config: Any, generation: Any, notes: list[str]) -> None:
    """Move settings such as ``config.temperature`` to the generation config, as transformers requires for saving."""
    for name, value in config._get_generation_parameters().items():
        config.__dict__.pop(name, None)
        if getattr(generation, name, None) is None:
            setattr(generation, name, value)
        kept = getattr(generation, name)
        notes.append(f"model.config.{name} is a generation setting; {GENERATION_CONFIG} has it, as {kept!r:.100}.")


def _loadable(given: Any, notes: list[str]) -> Any:
    """A copy of a generation config that transformers can load.

    Settings that ``generate()`` ignores are kept, because other programs read them. Invalid ones are omitted.
    """
    generation = copy.copy(given)
    for name, value in vars(given).items():
        generation.__dict__[name] = _plain(value, f"generation_config.{name}", notes)
    fault = _fault(generation, strict=True)
    if fault is None:
        return generation
    if _fault(generation) is None:
        ignored = [f"{name} ({getattr(generation, name)!r})" for name in re.findall(r"^- `(\w+)`", fault, re.MULTILINE)]
        notes.append(
            f"generate() ignores these settings of generation_config: {', '.join(ignored) or fault}. They are saved as "
            "they are; set do_sample=True in it to sample with temperature, top_p and top_k."
        )
        return generation
    return _without_invalid(generation, notes)


def _without_invalid(generation: Any, notes: list[str]) -> Any:
    from transformers import GenerationConfig

    empty = GenerationConfig()
    valid = copy.copy(generation)
    left = {name: value for name, value in vars(generation).items() if value != getattr(empty, name, None)}
    valid.__dict__.update({name: getattr(empty, name, None) for name in left})
    while added := [name for name, value in left.items() if _accepts(valid, name, value)]:
        for name in added:
            del left[name]
    for name, value in left.items():
        notes.append(f"generation_config.{name} is {value!r:.100}, which transformers cannot load; it is not saved.")
    return valid


def _accepts(generation: Any, name: str, value: object) -> bool:
    """Set a value, and take it back if the config is invalid then."""
    before = getattr(generation, name)
    generation.__dict__[name] = value
    if _fault(generation) is None:
        return True
    generation.__dict__[name] = before
    return False


def _fault(generation: Any, *, strict: bool = False) -> str | None:
    try:
        generation.validate(strict=strict)
        json.loads(generation.to_json_string(use_diff=True, keys_to_pop=["compile_config"]))
    except Exception as error:  # noqa: BLE001 - a value of the wrong type raises anything
        return str(error)
    return None
