"""Loading a GGUF file as a trainable model: its weights are dequantized.

transformers reads the file, using the package ``gguf``. It then refuses to save the model, because the config still
describes it as quantized (transformers 5.23); `load_gguf` removes that from the config.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zeta_core.failures import InvalidModel
from zeta_core.report.library_noise import without_gguf_progress_bar


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and path.is_file()


def load_gguf(path: Path, name: str) -> nn.Module:
    """The causal language model in the file, in float32. Raises `InvalidModel`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with without_gguf_progress_bar():
            read: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        config = read.config.to_dict()
        config.pop("quantization_config", None)
        config.pop("dtype", None)
        plain = AutoConfig.for_model(config.pop("model_type"), **config)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(plain)
        model.load_state_dict(read.state_dict(), assign=True)
        model.tie_weights()
        # Buffers computed from the config are in no state dict, and have no storage in `model` yet.
        for part, whole in zip(model.modules(), read.modules(), strict=True):
            for buffer, value in whole.named_buffers(recurse=False):
                setattr(part, buffer, value)
        model.generation_config = read.generation_config
    except Exception as error:
        raise _unreadable(path, name, error) from error
    return cast(nn.Module, model)


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer in the file. Raises `InvalidModel`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise _unreadable(path, path.name, error) from error


def _is_truncated(path: Path) -> bool:
    """Whether the header of the file describes more than the file contains."""
    from gguf import GGUFReader

    try:
        GGUFReader(path)
    except (ValueError, IndexError, OverflowError, struct.error):
        return True
    return False


def _unreadable(path: Path, name: str, error: Exception) -> InvalidModel:
    if isinstance(error, ImportError):
        return InvalidModel(f"{name} is a GGUF file, which requires the package gguf; install it: pip install gguf")
    reason = f"{type(error).__name__}: {str(error)[:300]}"
    if _is_truncated(path):
        reason += ". The file is probably truncated; compare its size with the original, and download it again."
    return InvalidModel(f"The GGUF model {name} cannot be read: {reason}")
