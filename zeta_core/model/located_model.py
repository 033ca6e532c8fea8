"""A model that was found, with the ways to build it, and the names of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.model.gguf import is_gguf

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class LocatedModel:
    """A model that has been located but not built yet."""

    build: Callable[[], nn.Module]
    name: str
    directory: Path | None = None  # the location of its files
    base_model: str | None = None  # its public name: a Hub id with its commit, a checkpoint of a job, or a file id
    pretrained: bool = False
    from_caller: bool = False  # the caller's own object, trained in place
    dtype: torch.dtype | None = None  # the stored precision of its weights; None means the precision when built
    needs_weights: bool = False  # its weights, which were not fetched, are the only description of its architecture
    build_mapped: Callable[[], nn.Module] | None = None  # builds it in its stored precision, memory-mapped
    # The same with the values of `build`; None if its files contain weights in several precisions.
    build_exact: Callable[[], nn.Module] | None = None
    # Of an adapter: builds its base, changes it with the argument, and adds the adapter without merging it.
    build_adapted: Callable[[Callable[[nn.Module], None]], PeftModel] | None = None
    # Of an adapter: the model that trains it further with these options. Raises `CannotTrain` and `InvalidModel`.
    continue_adapter: Callable[[TrainerOptions], LocatedModel] | None = None
    continued_settings: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of an adapter that is continued

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model's files include a tokenizer."""
        own = self.directory
        return own is not None and (is_gguf(own) or any((own / name).is_file() for name in TOKENIZER_FILES))
