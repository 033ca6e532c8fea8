"""Filtering library messages that a reader of the job's log cannot act on.

The filter drops deprecation warnings from libraries and from this package, a short list of other messages, each with a
reason, and DeepSpeed's messages below ERROR. It keeps all warnings from the user's own code, and all library messages
about the model, the data or the machine.

All of it applies to training processes. In a script that calls `zeta.Trainer`, only the listed log messages and, while
it trains, progress bars are hidden; the script keeps its own configuration of warnings.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

# Users cannot fix deprecated calls in these modules: the libraries that a run imports, and this project.
_LIBRARIES = (
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "gguf", "huggingface_hub", "numpy", "peft", "pyarrow",
    "pydantic", "safetensors", "tokenizers", "torch", "transformers", "triton", "zeta", "zeta_core",
)  # fmt: skip
_MODULES = rf"(?:{'|'.join(_LIBRARIES)})(?:\.|$)"
_DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

# Other warnings, matched by the beginning of their message.
_WARNINGS = (
    # This package steps the schedule, or Accelerate does when it skips a step because of the loss scale.
    r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`",
    r"Seems like `optimizer\.step\(\)` has been overridden after learning rate scheduler",
    # This package sets up activation checkpointing.
    r"torch\.utils\.checkpoint: the use_reentrant parameter should be passed explicitly",
    r"None of the inputs have requires_grad=True",
    # Every process has its own device, and only this package uses barriers.
    r"(?:barrier|No device id is provided)",
)


@dataclass(frozen=True)
class _Noise:
    """Messages of one logger to drop: those that match ``pattern``, and those with a level lower than ``below``."""

    logger: str
    pattern: str = r"(?!)"
    below: int = logging.NOTSET


_MESSAGES = (
    # An optional package for faster kernels on CPUs.
    _Noise("bitsandbytes.backends.cpu.ops", r"Failed to load CPU gemm"),
    # Its accelerator, version and configuration. Accelerate imports DeepSpeed whenever it is installed.
    _Noise("DeepSpeed", below=logging.ERROR),
    # About sampling; training only stores these values.
    _Noise("transformers.generation.configuration_utils", r"The following generation flags are not valid"),
    # Activation checkpointing sets this during training.
    _Noise("transformers.modeling_layers", r"`use_cache=True` is incompatible with gradient checkpointing"),
    # This package computes the loss, and cuts documents to seq_len.
    _Noise("transformers.modeling_utils", r"`loss_type=None` was set in the config"),
    _Noise("transformers.tokenization_utils_base", r"Token indices sequence length is longer than"),
    _Noise("transformers.tokenization_utils_base", r"You're using a \w+ tokenizer\. Please note that"),
)


def hide_library_noise() -> None:
    """Configure the warnings and loggers of this process. Libraries may be imported before or after the call."""
    for category in _DEPRECATIONS:
        warnings.filterwarnings("ignore", category=category, module=_MODULES)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=_MODULES)
    hide_library_messages()


def hide_library_messages() -> None:
    """Configure the loggers of this process. May be called repeatedly."""
    for name in {noise.logger for noise in _MESSAGES}:
        logging.getLogger(name).addFilter(_FILTER)


@contextmanager
def without_progress_bars() -> Generator[None]:
    """Hide the progress bars of transformers, because the report already contains the phases of a run."""
    from transformers.utils import logging as library_logging

    were_enabled = library_logging.is_progress_bar_enabled()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_enabled:
            library_logging.enable_progress_bar()


@contextmanager
def without_gguf_progress_bar() -> Generator[None]:
    """Hide the progress bar of reading a GGUF file, which `without_progress_bars` does not affect.

    The module that shows it takes a second to import, so this is only used to read such a file.
    """
    from transformers import modeling_gguf_pytorch_utils

    reader: Any = modeling_gguf_pytorch_utils
    tqdm = reader.tqdm
    reader.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        reader.tqdm = tqdm


class _Filter(logging.Filter):
    """Drops the messages of `_MESSAGES`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(
            record.name == noise.logger
            and (record.levelno < noise.below or re.match(noise.pattern, record.getMessage()))
            for noise in _MESSAGES
        )


_FILTER = _Filter()
