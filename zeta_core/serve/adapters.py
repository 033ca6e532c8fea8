"""Several adapters on one base: the base is in memory once, and one adapter is active at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zeta_core.contract.spec.sources import JobModel, NamedModel
from zeta_core.contract.wire.answers import ServeFile
from zeta_core.contract.wire.run_directory import checkpoint_key
from zeta_core.data.sources import SourceLocations
from zeta_core.failures import InvalidModel
from zeta_core.model.folders import folder_copy, ignore_code
from zeta_core.model.sources import LocatedModel, resized_embeddings
from zeta_core.model.tokenizer import locate_tokenizer
from zeta_core.serve.loading import LoadedModel, check_manifest, end_tokens

FIRST = "default"  # peft's name of the adapter that was loaded with the base


class SharedBase:
    """A base and its adapters, which are named by keys. The adapter that was loaded with the base has the key None."""

    def __init__(self, first: LoadedModel) -> None:
        """``first`` may be a whole model, which can't share anything."""
        self._first = first
        self._names: dict[str | None, str] = {None: FIRST}
        self._active = FIRST

    def add(self, key: str, file: ServeFile) -> LoadedModel:
        """Load the adapter whose checkpoint is in the artifact store of ``file``.

        Raises `InvalidModel` or an exception of peft if it needs a base of its own, and `WeightsReplaced`.
        """
        name, first = file.weights.name, self._first
        if first.adapted is None:
            raise InvalidModel(f"{name} is an adapter, but the loaded model has none.")
        check_manifest(file)
        directory = _directory(file)
        located = LocatedModel(lambda: first.model, name, directory)
        tokenizer = locate_tokenizer(None, located, _locations(file), Path(file.cache_dir))
        rows = resized_embeddings(first.model, directory)
        if rows is not None:
            raise InvalidModel(f"{name} has {rows} embeddings, and the loaded base has another number.")
        own = f"adapter{len(self._names)}"
        try:
            device = str(first.device)
            result: Any = first.adapted.load_adapter(str(directory), own, torch_device=device, local_files_only=True)
            if result.missing_keys:
                raise InvalidModel(f"{name} lacks {len(result.missing_keys)} weights of its layers.")
        except Exception:
            if own in first.adapted.peft_config:
                first.adapted.delete_adapter(own)
            raise
        finally:
            first.adapted.set_adapter(self._active, inference_mode=True)
            first.model.to(first.device).eval()
        self._names[key] = own
        ends = end_tokens(_generation_config(directory), tokenizer)
        return LoadedModel(first.model, tokenizer, first.device, ends, first.context_tokens)

    def activate(self, key: str | None) -> None:
        """Let the model compute with this adapter."""
        name = self._names[key]
        if name != self._active and self._first.adapted is not None:
            self._first.adapted.set_adapter(name, inference_mode=True)
            self._active = name


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
