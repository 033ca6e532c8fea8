"""Exporting weights in formats that other libraries load: a Hugging Face model, a peft adapter, or plain tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from zeta_core.checkpoint.staging import Tensors
from zeta_core.contract.job.checkpoint import CheckpointFormat
from zeta_core.contract.wire.run_directory import MERGED_NAME
from zeta_core.model.adapter import Adapter
from zeta_core.model.located_model import LocatedModel
from zeta_core.model.readme import README, adapter_readme
from zeta_core.model.skeleton import Skeleton


@dataclass(frozen=True)
class Exporter:
    """Exports the weights of a run. A plain module has no ``skeleton``."""

    skeleton: Skeleton | None
    tokenizer: Any
    dtype: torch.dtype | None  # None keeps the type of each tensor
    base: LocatedModel
    adapter: Adapter | None = None

    @property
    def base_model(self) -> str | None:
        return self.base.base_model

    @property
    def format(self) -> CheckpointFormat:
        if self.adapter is not None:
            return "adapter"
        return "module" if self.skeleton is None else "huggingface"

    def write(self, folder: Path, weights: Tensors, aliases: dict[str, str]) -> None:
        """Write the model or the adapter; if ``weights`` includes an adapter's base, also write the merged model."""
        self.tokenizer.save_pretrained(folder)
        if self.adapter is None:
            self._write_model(folder, weights, aliases)
            return
        self.adapter.write(folder, weights)
        if self.skeleton is not None:
            self.skeleton.save_generation_config(folder)
        has_merged = len(weights) > len(self.adapter.names)
        generates = self.skeleton is not None and self.skeleton.generation is not None
        readme = adapter_readme(
            self.base,
            self.tokenizer,
            is_module=self.skeleton is None,
            has_merged=has_merged,
            generates=generates,
            resized_to=self.adapter.resized_to,
        )
        (folder / README).write_text(readme, encoding="utf-8")
        if has_merged:
            merged = folder / MERGED_NAME
            merged.mkdir()
            name_of = self.adapter.base_name
            self._write_model(
                merged, self.adapter.merged(weights), {name_of(a): name_of(name) for a, name in aliases.items()}
            )
            self.tokenizer.save_pretrained(merged)

    def _write_model(self, folder: Path, weights: Tensors, aliases: dict[str, str]) -> None:
        if self.skeleton is None:
            # Only one metadata entry: safetensors writes several in random order, but equal weights must give equal
            # files. Tied names are omitted; `safetensors.torch.load_model` restores them.
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        else:
            tensors = {name: self._cast(tensor) for name, tensor in weights.items()}
            tensors |= {alias: tensors[name] for alias, name in aliases.items()}
            self.skeleton.save(folder, tensors)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor
