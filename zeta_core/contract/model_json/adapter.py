"""``adapter_config.json`` of a LoRA adapter (peft 0.21): the keys that describe its matrices."""

from __future__ import annotations

from typing import Any

from zeta_core.contract.identifiers import is_hub_id, is_id
from zeta_core.contract.job.checkpoint import NAME_PATTERN
from zeta_core.contract.model_json.faults import JsonLocation
from zeta_core.contract.model_json.values import CODE_IS_NEVER_RUN, check_value

_KEYS_TEXT = """
peft_type task_type peft_version inference_mode r target_modules exclude_modules lora_alpha lora_dropout
fan_in_fan_out bias use_rslora modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern
alpha_pattern trainable_token_indices use_dora lora_bias target_parameters ensure_weight_tying revision
"""
_KEYS = frozenset(_KEYS_TEXT.split())
_MODULE_KEYS = ("auto_mapping", "megatron_core")  # modules that peft would import for other kinds of adapters


def clean_adapter(config: dict[str, Any], location: JsonLocation) -> dict[str, Any]:
    """The supported keys; the base must be that of a job, an upload or the Hub. Raises `InvalidModelFiles`."""
    if config.get("peft_type") != "LORA":
        location.reject("peft_type", config.get("peft_type"), "only LoRA adapters are read")
    clean: dict[str, Any] = {}
    for key, value in config.items():
        if key == "base_model_name_or_path":
            if value is not None and not (isinstance(value, str) and _is_a_base(value)):
                location.reject(key, value, "it must be the Hub id of the base; use the merged model instead")
            clean[key] = value
        elif key in _MODULE_KEYS:
            if value is not None and not _is_of_a_library(value):
                location.reject(key, value, CODE_IS_NEVER_RUN)
        elif key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            clean[key] = value  # regular expressions for names of layers, which may contain backslashes
        else:
            check_value(location, key, value)
            if key in _KEYS:
                clean[key] = value
    return clean


def _is_a_base(name: str) -> bool:
    job, _, checkpoint = name.partition("/")
    if is_id(job, "job"):
        return NAME_PATTERN.match(checkpoint) is not None
    return not name or is_id(name, "file") or is_hub_id(name)


def _is_of_a_library(value: object) -> bool:
    """Whether peft itself wrote the value: a class of transformers with its module, or Megatron's package."""
    if isinstance(value, dict):
        return str(value.get("parent_library", "")).startswith("transformers.")
    return value == "megatron.core"
