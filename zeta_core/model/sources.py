"""Locating a model source and building it as an ``nn.Module`` in float32.

Modules, callables and local directories passed by a script are trusted, and so are builders installed on this machine.
Everything that a job names or that comes from the Hub is untrusted: weights are read only from safetensors, nothing is
unpickled, code in model repositories never runs (``trust_remote_code`` is always off), and libraries only see a
self-contained copy made by `folders`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zeta_core.contract.identifiers import is_hub_id, is_id
from zeta_core.contract.job.checkpoint import NAME_PATTERN
from zeta_core.contract.model_json.faults import JsonLocation
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import BuilderModel, ConfigModel, FileModel, JobModel
from zeta_core.contract.wire.run_directory import MERGED_NAME, checkpoint_key
from zeta_core.data.sources import SourceLocations
from zeta_core.failures import InvalidModel
from zeta_core.model.adapter_checkpoint import AdapterCheckpoint, read_adapter
from zeta_core.model.continued_adapter import continue_adapter
from zeta_core.model.folders import OnIgnored, folder_copy, hub_copy, ignore_code, report_ignored_code, upload_copy
from zeta_core.model.gguf import is_gguf, load_gguf
from zeta_core.model.located_model import ADAPTER_CONFIG, LocatedModel
from zeta_core.model.transformers_models import build_module, load_directory, model_from_config, model_from_directory
from zeta_core.system.model_files import InvalidModelFiles, clean_config


def locate_model(
    model: object, locations: SourceLocations, cache: Path, *, on_ignored: OnIgnored = ignore_code
) -> LocatedModel:
    """Locate a model, and fetch or unpack its files if needed. Raises `InvalidModel`.

    ``on_ignored`` is called for each model whose files refer to code, which is never run.
    """
    match model:
        case nn.Module():
            name = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
            commit = getattr(getattr(model, "config", None), "_commit_hash", None)  # set if it comes from the Hub
            base = f"{name}@{commit}" if commit else name if name and Path(name).is_dir() else None
            return LocatedModel(
                lambda: model, type(model).__name__, base_model=base, pretrained=bool(name), from_caller=True
            )
        case ConfigModel():
            try:
                config = clean_config(model.config, JsonLocation("model.config", origin="spec"))
            except InvalidModelFiles as error:
                raise InvalidModel(error.message) from error
            return model_from_config(config)
        case JobModel():
            if locations.artifacts_root is None:
                raise InvalidModel(f"model names {model.job}, but a script has no jobs; name a directory instead.")
            directory = locations.artifacts_root / checkpoint_key(model.job, model.checkpoint)
            if not directory.is_dir():
                raise InvalidModel(f"model names checkpoint {model.checkpoint!r} of {model.job}, which is not stored.")
            name = f"{model.job}/{model.checkpoint}"
            copy = folder_copy(directory, name, locations, cache, on_ignored)
            return _from_files(copy, name, locations, cache, on_ignored, base_model=name, written_by_service=True)
        case FileModel():
            copy = upload_copy(model.file, locations, cache)
            return _from_files(copy, model.file, locations, cache, on_ignored, base_model=model.file)
        case BuilderModel():
            return _from_builder(model)
        case Path():
            if locations.any_path:
                report_ignored_code(model, str(model), on_ignored)
            directory = model if locations.any_path else folder_copy(model, model.name, locations, cache, on_ignored)
            return _from_files(directory, str(model), locations, cache, on_ignored, base_model=str(model))
        case str():
            local = Path(model).expanduser()
            if locations.any_path and (local.is_dir() or is_gguf(local)):
                report_ignored_code(local, model, on_ignored)
                return _from_files(local, model, locations, cache, on_ignored, base_model=model)
            directory, commit = hub_copy(model, locations, cache, on_ignored, what="model")
            base_model = f"{model.partition('@')[0]}@{commit}"
            return _from_files(directory, model, locations, cache, on_ignored, base_model=base_model)
        case _ if hasattr(model, "model_type") and hasattr(model, "to_dict"):
            return model_from_config(cast(Any, model).to_dict())
        case _ if callable(model):
            return LocatedModel(
                lambda: build_module(cast("Callable[[], object]", model)), getattr(model, "__name__", "callable")
            )
        case _:
            raise InvalidModel(
                f"model is {model!r:.200}; pass an nn.Module, a callable that builds one, a config, a Hub id or a "
                "local directory."
            )


def locate_written_checkpoint(directory: Path, name: str, locations: SourceLocations, cache: Path) -> LocatedModel:
    """Locate a model or an adapter that this program has written to ``directory``, so its files are trusted."""
    return _from_files(directory, name, locations, cache, ignore_code, base_model=name, written_by_service=True)


def _from_files(
    path: Path,
    name: str,
    locations: SourceLocations,
    cache: Path,
    on_ignored: OnIgnored,
    *,
    base_model: str,
    written_by_service: bool = False,
) -> LocatedModel:
    """A model in local files: a Hugging Face directory, an adapter's checkpoint, or a GGUF file.

    ``written_by_service`` means that a run of this service wrote the files. The base of any other adapter is unchecked:
    it could be another project's job, or a Hub repository that the operator did not allow.
    """
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / ADAPTER_CONFIG).is_file():
            if not written_by_service and not locations.any_path:
                raise InvalidModel(f"{name} is an adapter without its base model; upload the merged model instead.")
            return _from_adapter(path, name, locations, cache, on_ignored, base_model=base_model)
        if not locations.fetch_weights:
            return LocatedModel(
                lambda: load_directory(path, name), name, path, base_model, pretrained=True, needs_weights=True
            )
        path = next(iter(sorted(path.glob("*.gguf"))), path)
    if is_gguf(path):
        # Weights that were quantized have no precision to export in. Such models are usually published in bfloat16.
        return LocatedModel(
            lambda: load_gguf(path, name), name, path, base_model, pretrained=True, dtype=torch.bfloat16
        )
    return model_from_directory(path, name, locations, base_model=base_model)


def _from_adapter(
    directory: Path, name: str, locations: SourceLocations, cache: Path, on_ignored: OnIgnored, *, base_model: str
) -> LocatedModel:
    """A LoRA checkpoint as a model: its merged weights, or its base with the adapter merged into it."""

    def read() -> tuple[AdapterCheckpoint, LocatedModel]:
        adapter = read_adapter(directory, name, locations)
        source = _base_from_name(adapter.base_name, adapter.revision, locations)
        return adapter, locate_model(source, locations, cache, on_ignored=on_ignored)

    if (directory / MERGED_NAME / "config.json").is_file():
        merged = model_from_directory(directory / MERGED_NAME, name, locations, base_model=base_model)

        def continued(options: TrainerOptions) -> LocatedModel:
            return continue_adapter(*read(), options)

        return replace(merged, continue_adapter=continued)
    adapter, base = read()
    located = adapter.located(base, base_model=base_model) if locations.fetch_weights else base
    return replace(located, continue_adapter=partial(continue_adapter, adapter, base))


def _base_from_name(base_name: str, revision: object, locations: SourceLocations) -> object:
    """The base in an adapter's config: a job's checkpoint, an uploaded file, a directory or a Hub id."""
    job, _, checkpoint = base_name.partition("/")
    if is_id(job, "job") and NAME_PATTERN.match(checkpoint):
        return JobModel(job=job, checkpoint=checkpoint)
    if is_id(base_name, "file"):
        return FileModel(file=base_name)
    if not locations.any_path and not is_hub_id(base_name):
        raise InvalidModel(f"The adapter's base is {base_name!r}, which is not a Hub id; use the merged model instead.")
    return f"{base_name}@{revision}" if revision else base_name


def _from_builder(source: BuilderModel) -> LocatedModel:
    builders = tuple(entry_points(group="zeta.models", name=source.builder))
    if not builders:
        installed = ", ".join(sorted(entry_points(group="zeta.models").names)) or "none"
        raise InvalidModel(
            f"model.builder is {source.builder!r}, which is not installed here (installed: {installed})."
        )
    return LocatedModel(lambda: build_module(lambda: builders[0].load()(**source.arguments)), source.builder)
