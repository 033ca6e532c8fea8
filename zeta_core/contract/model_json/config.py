"""``config.json`` and ``generation_config.json``: plain data is kept, and references outside the model are rejected.

Model families often add keys, so unknown keys are accepted if their value is plain: a number, a boolean, a short text
without a path separator, or lists and objects of these. Values that transformers 5.23 resolves to code, a file, a
repository or a kernel are recognized by their key (`values.CODE_KEYS`, `values.names_a_file` and below).
"""

from __future__ import annotations

import re
from typing import Any, cast

from zeta_core.contract.model_json.faults import JsonLocation
from zeta_core.contract.model_json.json_files import MAX_DEPTH
from zeta_core.contract.model_json.values import (
    CODE_KEYS,
    RECORD_KEYS,
    check_value,
    is_left_out,
    is_scalar,
    is_text,
    names_a_file,
)
from zeta_core.contract.strict_json import is_deeper

# If the package `kernels` is installed, transformers downloads and runs "owner/kernel" and the kernels of the other
# names (`integrations/hub_kernels.py`, `integrations/moe.py`).
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_IMPLEMENTATIONS = {"attn": ("eager", "sdpa"), "experts": ("eager", "batched_mm", "grouped_mm")}
# Preferences of the machine on which a model was saved. They are ignored, and the library chooses its default.
_PREFERENCES = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention", "deepgemm", "sonicmoe")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
DTYPES = frozenset(
    {"auto", "float16", "bfloat16", "float32", "float64", "half", "float", "double", "float8_e4m3fn", "float8_e5m2"}
)
# Formats that transformers reads without external code. If true, weights are dequantized when they are loaded.
_QUANTIZED = {"mxfp4": True, "fp8": True, "bitsandbytes": False}
_QUANTIZATION_KEYS = (
    *("modules_to_not_convert", "modules_to_convert", "ignored_layers", "weight_block_size", "activation_scheme"),
    *("fmt", "scale_fmt", "expert_dtype"),
)
_TOKENIZER_CLASS = re.compile(r"(?!Auto|Rag)[A-Za-z0-9_]{1,80}Tokenizer(Fast|Legacy)?")
_TOKENIZER_BACKENDS = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend")


def clean_config(config: dict[str, Any], location: JsonLocation) -> dict[str, Any]:
    """A model's config without the values that libraries must not see. Raises `InvalidModelFiles`."""
    if is_deeper(config, MAX_DEPTH):
        location.reject(
            "model_type", config.get("model_type"), f"its config is nested more than {MAX_DEPTH} levels deep"
        )
    clean: dict[str, Any] = {}
    for key, value in config.items():
        kept = _clean_value(location, key, value)
        if kept is not _LEFT_OUT:
            clean[key] = kept
    return clean


_LEFT_OUT: Any = object()


def _clean_value(location: JsonLocation, key: str, value: Any) -> Any:
    """The value that the library may see, or `_LEFT_OUT`."""
    implementation = _IMPLEMENTATION.fullmatch(key)
    if implementation is not None:
        return _clean_implementation(location, key, value, implementation[1])
    if key in RECORD_KEYS:
        return _LEFT_OUT
    if key in ("quantization_config", "compression_config"):
        return _clean_quantization(location, key, value)
    if is_text(key, value):
        return value
    if key in ("model_type", "dtype", "torch_dtype", "tokenizer_class", "processor_class", "architectures"):
        _check_name(location, key, value)
        return value
    is_reference = key in CODE_KEYS or names_a_file(key)
    if isinstance(value, dict) and not is_reference:
        return clean_config(cast("dict[str, Any]", value), location.inside(key))
    if (
        isinstance(value, list)
        and not is_reference
        and any(isinstance(item, dict) for item in cast("list[Any]", value))
    ):
        items = cast("list[Any]", value)
        return [
            clean_config(cast("dict[str, Any]", item), location.inside(f"{key}.{number}"))
            if isinstance(item, dict)
            else _checked(location, key, item)
            for number, item in enumerate(items)
        ]
    check_value(location, key, value)
    return _LEFT_OUT if is_left_out(location, key, value) else value


def _checked(location: JsonLocation, key: str, value: Any) -> Any:
    check_value(location, key, value)
    return value


def _clean_implementation(location: JsonLocation, key: str, value: Any, kind: str) -> Any:
    allowed = _IMPLEMENTATIONS[kind]
    names = list(cast("dict[str, Any]", value).values()) if isinstance(value, dict) else [value]
    wrong = [name for name in names if name is not None and name not in allowed]
    if not wrong:
        return value
    if location.origin == "external" and all(name in _PREFERENCES for name in wrong):
        return _LEFT_OUT
    location.reject(key, value, f"it must be {' or '.join(map(repr, allowed))}; third-party kernels are never loaded")


def _clean_quantization(location: JsonLocation, key: str, value: Any) -> Any:
    if value is None:
        return None
    quantization = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    method = quantization.get("quant_method")
    if key != "quantization_config" or method not in _QUANTIZED:
        supported = ", ".join(_QUANTIZED)
        location.reject(
            key, value, f"weights quantized this way cannot be trained (supported: {supported}); use full weights"
        )
    clean: dict[str, Any] = {"quant_method": method}
    for name, inner in quantization.items():
        check_value(location.inside(key), name, inner)
        if name in _QUANTIZATION_KEYS or (name.startswith("bnb_") and is_scalar(inner)) or name.startswith("load_in_"):
            clean[name] = inner
    if _QUANTIZED[method]:
        clean["dequantize"] = True  # otherwise, a kernel from the Hub multiplies the quantized weights
    return clean


def _check_name(location: JsonLocation, key: str, value: Any) -> None:
    """Reject a value that is not the name of a class, a model family or a dtype."""
    if value is None:
        return
    if key == "tokenizer_class":
        check_tokenizer_class(location, key, value)
    elif key in ("dtype", "torch_dtype"):
        # In nested objects, other programs (transformers.js) also use the key.
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if not (isinstance(name, str) and (name in DTYPES or (location.path and _NAME.fullmatch(name)))):
            if isinstance(value, dict) and location.path:
                clean_config(cast("dict[str, Any]", value), location.inside(key))
                return
            location.reject(key, value, f"it must be one of {', '.join(sorted(DTYPES))}")
    else:
        names = cast("list[Any]", value) if isinstance(value, list) and key == "architectures" else [value]
        if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
            location.reject(key, value, "it must be a name of letters, digits, '_', '.' and '-'")


def check_tokenizer_class(location: JsonLocation, key: str, value: Any) -> None:
    """Reject a value that is not the name of a tokenizer: transformers would look up any name in all its exports."""
    is_name = isinstance(value, str) and (_TOKENIZER_CLASS.fullmatch(value) is not None or value in _TOKENIZER_BACKENDS)
    if not is_name and value is not None:
        location.reject(key, value, "it must be the name of a transformers tokenizer class, such as 'LlamaTokenizer'")
