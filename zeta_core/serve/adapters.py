"""Several adapters on one base: the base is in memory once, and one adapter is active at a time, or none of them.

The base itself can answer, too, while no adapter is active.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeta_core.contract.spec.sources import JobModel, NamedModel
from zeta_core.contract.wire.answers import ServeFile
from zeta_core.contract.wire.run_directory import checkpoint_key
from zeta_core.data.sources import SourceLocations
from zeta_core.failures import InvalidModel
from zeta_core.model.adapter_checkpoint import resized_embeddings
from zeta_core.model.existing_adapter import disable_adapters
from zeta_core.model.folders import folder_copy, ignore_code
from zeta_core.model.inspection import embedding_rows
from zeta_core.model.located_model import GENERATION_CONFIG, LocatedModel
from zeta_core.model.sources import locate_model
from zeta_core.model.tokenizer import locate_tokenizer
from zeta_core.serve.loading import LoadedModel, check_manifest, end_tokens, source_locations

if TYPE_CHECKING:
    from peft import PeftModel

FIRST = "default"  # peft's name of the adapter that was loaded with the base


class SharedBase:
    """A base and its adapters, which are named by keys. What was loaded first has the key None."""

    def __init__(self, first: LoadedModel, *, is_base: bool = False) -> None:
        """``first`` is an adapter with its base, a base (``is_base``), or another whole model, which shares nothing."""
        self._first = first
        self._is_base = is_base
        self._adapted: PeftModel | None = first.adapted
        self._names: dict[str | None, str | None] = {None: None if first.adapted is None else FIRST}
        self._active: str | None = self._names[None]  # None: the base without an adapter

    def add(self, key: str, file: ServeFile) -> LoadedModel:
        """Load an adapter whose checkpoint is in the artifact store of ``file``, or let the loaded base answer.

        Raises `InvalidModel` or an exception of peft if it needs a process of its own, and `WeightsReplaced`.
        """
        if self._adapted is None and not self._is_base:
            raise InvalidModel(f"{file.weights.name} is an adapter, but the loaded model has none.")
        check_manifest(file)
        return self._add_base(key, file) if file.weights.is_base else self._add_adapter(key, file)

    def activate(self, key: str | None) -> None:
        """Let the model compute with this adapter, or as the base."""
        if self._names[key] != self._active:
            self._switch(self._names[key])

    def _add_adapter(self, key: str, file: ServeFile) -> LoadedModel:
        name, first = file.weights.name, self._first
        directory = _directory(file)
        located = LocatedModel(lambda: first.model, name, directory)
        tokenizer = locate_tokenizer(None, located, _locations(file), Path(file.cache_dir))
        rows = resized_embeddings(first.model, directory)
        if rows is not None:
            raise InvalidModel(f"{name} has {rows} embeddings, and the loaded base has another number.")
        own = f"adapter{len(self._names)}"
        try:
            self._load(own, name, directory)
        finally:
            self._switch(self._active)
            first.model.to(first.device).eval()
        self._names[key] = own
        ends = end_tokens(_generation_config(directory), tokenizer)
        return LoadedModel(first.model, tokenizer, first.device, ends, first.context_tokens)

    def _load(self, own: str, name: str, directory: Path) -> None:
        """Load the adapter's weights as ``own``."""
        from peft import PeftModel

        if self._adapted is None:  # the first adapter of a base
            model: Any = self._first.model
            try:
                self._adapted = PeftModel.from_pretrained(
                    model, str(directory), adapter_name=own, local_files_only=True
                )
            except Exception:
                disable_adapters(model)
                self._is_base = False  # its layers can't be replaced again, so it takes no more adapters
                raise
            return
        try:
            device = str(self._first.device)
            result: Any = self._adapted.load_adapter(str(directory), own, torch_device=device, local_files_only=True)
            if result.missing_keys:
                raise InvalidModel(f"{name} lacks {len(result.missing_keys)} weights of its layers.")
        except Exception:
            if own in self._adapted.peft_config:
                self._adapted.delete_adapter(own)
            raise

    def _add_base(self, key: str, file: ServeFile) -> LoadedModel:
        """The base of the loaded adapters, with its own tokenizer and end tokens."""
        name, first = file.weights.name, self._first
        located = locate_model(
            NamedModel.model_validate({"model": file.weights.model}).model, source_locations(file), Path(file.cache_dir)
        )
        tokenizer = locate_tokenizer(None, located, source_locations(file), Path(file.cache_dir))
        rows = embedding_rows(first.model)
        if first.has_own_embeddings or (rows is not None and len(tokenizer) > rows):
            raise InvalidModel(f"{name} has another number of embeddings than with the loaded adapter.")
        self._names[key] = None
        directory = located.directory
        has_config = directory is not None and (directory / GENERATION_CONFIG).is_file()
        generation_config = _generation_config(directory) if directory and has_config else _default_config(first.model)
        ends = end_tokens(generation_config, tokenizer)
        return LoadedModel(first.model, tokenizer, first.device, ends, first.context_tokens)

    def _switch(self, name: str | None) -> None:
        self._active = name
        if self._adapted is None:
            return
        layers: Any = self._adapted.base_model
        if name is None:
            layers.disable_adapter_layers()
        else:
            layers.enable_adapter_layers()
            self._adapted.set_adapter(name, inference_mode=True)


def _locations(file: ServeFile) -> SourceLocations:
    return SourceLocations(artifacts_root=Path(file.artifacts_root), allow_hub=False)


def _directory(file: ServeFile) -> Path:
    """A checked copy of the adapter's files."""
    source = NamedModel.model_validate({"model": file.weights.model}).model
    assert isinstance(source, JobModel), "only checkpoints of jobs are adapters"
    stored = Path(file.artifacts_root) / checkpoint_key(source.job, source.checkpoint)
    return folder_copy(stored, file.weights.name, _locations(file), Path(file.cache_dir), ignore_code)


def _generation_config(directory: Path) -> object:
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(directory)


def _default_config(model: Any) -> object:
    """The generation settings that transformers uses for a model without a file of them."""
    from transformers import GenerationConfig

    return GenerationConfig.from_model_config(model.config)
