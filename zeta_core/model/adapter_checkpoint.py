"""An adapter in a local directory: the base that it names, and building that base with the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from zeta_core.data.sources import SourceLocations
from zeta_core.failures import InvalidModel
from zeta_core.model.located_model import ADAPTER_CONFIG, ADAPTER_WEIGHTS, GENERATION_CONFIG, LocatedModel

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class AdapterCheckpoint:
    """An adapter with the name of its base and, for a base on the Hub, the revision."""

    directory: Path
    name: str
    base_name: str
    revision: object
    has_weights: bool  # false if neither the adapter's weights nor those of its base are fetched

    def located(self, base: LocatedModel, *, base_model: str) -> LocatedModel:
        """The model that consists of ``base`` and this adapter."""
        return LocatedModel(
            partial(self._build_merged, base),
            self.name,
            self.directory,
            base_model,
            pretrained=True,
            dtype=base.dtype,
            build_adapted=partial(self._build_adapted, base),
        )

    def added_to(self, base: nn.Module, change_base: Callable[[nn.Module], None] | None = None) -> PeftModel:
        """``base``, changed by ``change_base``, with the adapter beside its weights. Raises `InvalidModel`."""
        try:
            model = self._add_to(base, change_base)
            self._set_generation_config(cast(Any, model).get_base_model())
            return model
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise InvalidModel(f"The adapter {self.name} cannot be added to {self.base_name}: {error}") from error

    def resize_embeddings(self, base: nn.Module) -> None:
        """Give ``base`` as many embeddings as the adapter contains, if it contains them."""
        num_rows = resized_embeddings(base, self.directory)
        if num_rows is not None:
            cast(Any, base).resize_token_embeddings(num_rows, mean_resizing=False)

    def _build_merged(self, base: LocatedModel) -> nn.Module:
        try:
            adapted = cast(Any, self._add_to(base.build()))
            merged = adapted.merge_and_unload().requires_grad_(True)  # peft freezes the base
            self._set_generation_config(merged)
            return merged
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise InvalidModel(f"The adapter {self.name} cannot be merged into {self.base_name}: {error}") from error

    def _build_adapted(self, base: LocatedModel, change_base: Callable[[nn.Module], None]) -> PeftModel:
        return self.added_to(base.build(), change_base)

    def _add_to(self, base: nn.Module, change_base: Callable[[nn.Module], None] | None = None) -> PeftModel:
        from peft import PeftModel

        self.resize_embeddings(base)
        if change_base is not None:
            change_base(base)
        return cast(Any, PeftModel).from_pretrained(base, str(self.directory), local_files_only=True)

    def _set_generation_config(self, model: Any) -> None:
        from transformers import GenerationConfig

        if (self.directory / GENERATION_CONFIG).is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.directory)


def read_adapter(directory: Path, name: str, locations: SourceLocations) -> AdapterCheckpoint:
    """Read which base an adapter names. Raises `InvalidModel` if it names none, or one that it must not use."""
    try:
        config = cast("dict[str, Any]", json.loads((directory / ADAPTER_CONFIG).read_bytes()))
    except (OSError, ValueError) as error:
        raise InvalidModel(f"The {ADAPTER_CONFIG} of {name} cannot be read: {error}") from error
    base_name = str(config.get("base_model_name_or_path") or "")
    if not base_name:
        raise InvalidModel(
            f"{name} is an adapter whose base model has no name, so it cannot be loaded alone; train it again with "
            "lora.save_merged, which also stores the merged model."
        )
    if locations.bases is not None and base_name not in locations.bases:
        raise InvalidModel(
            f"{name} is an adapter that names {base_name[:300]!r} as its base, but its job was not trained on this "
            "model; train it again."
        )
    if locations.fetch_weights and not (directory / ADAPTER_WEIGHTS).is_file():
        raise InvalidModel(f"{name} has no {ADAPTER_WEIGHTS}; save the adapter with save_pretrained.")
    return AdapterCheckpoint(directory, name, base_name, config.get("revision"), locations.fetch_weights)


def resized_embeddings(base: nn.Module, adapter: Path) -> int | None:
    """The number of embeddings in the adapter if the base has another number; ``None`` if not, or if it has none."""
    rows = stored_embeddings(base, adapter) - {cast(Any, base).get_input_embeddings().num_embeddings}
    return rows.pop() if rows else None


def stored_embeddings(base: nn.Module, adapter: Path) -> set[int]:
    """The number of embeddings in the adapter; empty if it contains none."""
    from safetensors import safe_open

    embeddings = cast(Any, base).get_input_embeddings()
    name = next(name for name, part in base.named_modules() if part is embeddings)
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        names = {f"base_model.model.{name}.weight", f"base_model.model.{name}.base_layer.weight"} & set(file.keys())
        return {file.get_slice(saved).get_shape()[0] for saved in names}
