"""Keeps out of a job's log what libraries write and nobody who reads the log can act on.

Left out are: warnings of libraries (and of this package) about deprecated interfaces; a short list of other messages,
each with the reason; DeepSpeed's messages below an error. Everything else stays: warnings of the user's own code,
whatever their category, and messages of libraries about the model, the data or the machine.

Applies to training processes only; a script that calls `zeta.Trainer` keeps its own configuration.
"""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass

# The modules whose deprecations are for us to follow: those that a training imports, and our own.
_LIBRARIES = (
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "gguf", "huggingface_hub", "numpy", "peft", "pyarrow",
    "pydantic", "safetensors", "tokenizers", "torch", "transformers", "triton", "zeta", "zeta_core",
)  # fmt: skip
_MODULES = rf"(?:{'|'.join(_LIBRARIES)})(?:\.|$)"
_DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

# Other warnings, by the beginning of their message.
_WARNINGS = (
    # The schedule is stepped by us, or by Accelerate when a step was skipped for its loss scale.
    r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`",
    r"Seems like `optimizer\.step\(\)` has been overridden after learning rate scheduler",
    # Activation checkpointing is set up by us.
    r"torch\.utils\.checkpoint: the use_reentrant parameter should be passed explicitly",
    r"None of the inputs have requires_grad=True",
    # Every process has its own device; barriers are ours.
    r"(?:barrier|No device id is provided)",
)


@dataclass(frozen=True)
class _Noise:
    """Messages that one logger itself writes; ``below`` leaves out every message of a lower level."""

    logger: str
    pattern: str = r"(?!)"
    below: int = logging.NOTSET


_MESSAGES = (
    # An optional package for faster kernels on CPUs.
    _Noise("bitsandbytes.backends.cpu.ops", r"Failed to load CPU gemm"),
    # The accelerator that it found, its version and its configuration; Accelerate imports it where it is installed.
    _Noise("DeepSpeed", below=logging.ERROR),
    # About sampling; a training only stores these values.
    _Noise("transformers.generation.configuration_utils", r"The following generation flags are not valid"),
    # Set for the time of the training by activation checkpointing.
    _Noise("transformers.modeling_layers", r"`use_cache=True` is incompatible with gradient checkpointing"),
    # The loss is computed here, and documents are cut to seq_len here.
    _Noise("transformers.modeling_utils", r"`loss_type=None` was set in the config"),
    _Noise("transformers.tokenization_utils_base", r"Token indices sequence length is longer than"),
    _Noise("transformers.tokenization_utils_base", r"You're using a \w+ tokenizer\. Please note that"),
)


def leave_out_library_noise() -> None:
    """Configure warnings and loggers of this process; libraries may be imported before or after."""
    for category in _DEPRECATIONS:
        warnings.filterwarnings("ignore", category=category, module=_MODULES)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=_MODULES)
    noise_filter = _Filter()
    for name in {noise.logger for noise in _MESSAGES}:
        logging.getLogger(name).addFilter(noise_filter)


class _Filter(logging.Filter):
    """Drops the messages of `_MESSAGES`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(
            record.name == noise.logger
            and (record.levelno < noise.below or re.match(noise.pattern, record.getMessage()))
            for noise in _MESSAGES
        )
