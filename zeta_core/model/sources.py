"""Locating a model source and building it as an ``nn.Module`` in float32.

Modules, callables and local directories passed by a script are trusted, and so are builders installed on this machine.
Everything that a job names or that comes from the Hub is untrusted: weights are read only from safetensors, nothing is
unpickled, code in model repositories never runs (``trust_remote_code`` is always off), and libraries only see a
self-contained copy made by `folders`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from zeta_core.contract.identifiers import is_hub_id, is_id
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT, NAME_PATTERN
from zeta_core.contract.model_json.faults import JsonLocation
from zeta_core.contract.spec.sources import BuilderModel, ConfigModel, FileModel, JobModel
from zeta_core.contract.spec.validation import shown
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, MERGED_NAME, checkpoint_key
from zeta_core.data.sources import SourceLocations
from zeta_core.failures import InvalidModel
from zeta_core.model.folders import (
    OnIgnored,
    folder_copy,
    hub_copy,
    ignore_code,
    lfs_pointer_fault,
    report_ignored_code,
    upload_copy,
)
from zeta_core.model.gguf import is_gguf, load_gguf
from zeta_core.model.stored_precision import stored_precision
from zeta_core.system.model_files import InvalidModelFiles, clean_config

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"
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

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model's files include a tokenizer."""
        own = self.directory
        return own is not None and (is_gguf(own) or any((own / name).is_file() for name in TOKENIZER_FILES))


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
            return _from_config(config)
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
            return _from_config(cast(Any, model).to_dict())
        case _ if callable(model):
            return LocatedModel(
                lambda: _build_module(cast("Callable[[], object]", model)), getattr(model, "__name__", "callable")
            )
        case _:
            raise InvalidModel(
                f"model is {model!r:.200}; pass an nn.Module, a callable that builds one, a config, a Hub id or a "
                "local directory."
            )


def locate_written_checkpoint(directory: Path, name: str, locations: SourceLocations, cache: Path) -> LocatedModel:
    """Locate a model or an adapter that this program has written to ``directory``, so its files are trusted."""
    return _from_files(directory, name, locations, cache, ignore_code, base_model=name, written_by_service=True)


# --- Sources ----------------------------------------------------------------------------------------------------------


def _from_config(config: dict[str, Any]) -> LocatedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise InvalidModel("model.config has no model_type; name the architecture, such as 'llama'.")
    try:
        resolved = AutoConfig.for_model(model_type, **values)
    except Exception as error:
        raise InvalidModel(_config_fault(model_type, values, error)) from error
    if getattr(resolved, "auto_map", None):  # possible in a config object from a script
        raise InvalidModel("model.config has an auto_map; custom model code never runs here, so remove it.")

    def build() -> object:
        return AutoModelForCausalLM.from_config(resolved, dtype=torch.float32)

    return LocatedModel(lambda: _build_module(build), model_type)


_FIELD_ERROR = re.compile(r"Validation error for field '(?P<name>\w+)':\s+\w+: Field '\w+' expected (?P<type>\w+)")
_TYPES = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "list": "a list"}


def _config_fault(model_type: str, values: dict[str, Any], error: Exception) -> str:
    """One sentence about a config that transformers rejects, which reports a field or a rule in several lines."""
    text = str(error)
    field = _FIELD_ERROR.match(text)
    if field is not None and field["name"] in values:
        name, expected = field["name"], _TYPES.get(field["type"], f"of type {field['type']}")
        return f"model.config.{name} is {shown(values[name])}; it must be {expected}."
    reason = re.sub(r"^Class validation error[^\n]*\n\s*\w+: ", "", text).replace("\n", " ")
    return f"model.config is not a valid {model_type} config: {reason[:300].rstrip('.')}; correct it."


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
            return LocatedModel(lambda: _load(path, name), name, path, base_model, pretrained=True, needs_weights=True)
        path = next(iter(sorted(path.glob("*.gguf"))), path)
    if is_gguf(path):
        # Weights that were quantized have no precision to export in. Such models are usually published in bfloat16.
        return LocatedModel(
            lambda: load_gguf(path, name), name, path, base_model, pretrained=True, dtype=torch.bfloat16
        )
    return _from_directory(path, name, locations, base_model=base_model)


def _from_adapter(
    directory: Path, name: str, locations: SourceLocations, cache: Path, on_ignored: OnIgnored, *, base_model: str
) -> LocatedModel:
    """A LoRA checkpoint as a model: its merged weights, or its base with the adapter merged into it."""
    if (directory / MERGED_NAME / "config.json").is_file():
        return _from_directory(directory / MERGED_NAME, name, locations, base_model=base_model)
    try:
        about = cast("dict[str, Any]", json.loads((directory / ADAPTER_CONFIG).read_bytes()))
    except (OSError, ValueError) as error:
        raise InvalidModel(f"The {ADAPTER_CONFIG} of {name} cannot be read: {error}") from error
    base_name = str(about.get("base_model_name_or_path") or "")
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
    if locations.fetch_weights and not (directory / "adapter_model.safetensors").is_file():
        raise InvalidModel(f"{name} has no adapter_model.safetensors; save the adapter with save_pretrained.")
    base = locate_model(
        _base_from_name(base_name, about.get("revision"), locations), locations, cache, on_ignored=on_ignored
    )
    if not locations.fetch_weights:
        return base

    def adapted(change_base: Callable[[nn.Module], None]) -> Any:
        from peft import PeftModel

        built = base.build()
        rows = resized_embeddings(built, directory)
        if rows is not None:
            cast(Any, built).resize_token_embeddings(rows, mean_resizing=False)
        change_base(built)
        return PeftModel.from_pretrained(built, str(directory), local_files_only=True)

    def with_generation_config(model: Any) -> nn.Module:
        from transformers import GenerationConfig

        if (directory / GENERATION_CONFIG).is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        return model

    def build() -> nn.Module:
        try:
            merged = adapted(lambda _: None).merge_and_unload().requires_grad_(True)  # peft freezes the base
            return with_generation_config(merged)
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise InvalidModel(f"The adapter {name} cannot be merged into {base_name}: {error}") from error

    def build_adapted(change_base: Callable[[nn.Module], None]) -> PeftModel:
        try:
            model = adapted(change_base)
            with_generation_config(model.get_base_model())
            return model
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise InvalidModel(f"The adapter {name} cannot be added to {base_name}: {error}") from error

    return LocatedModel(
        build, name, directory, base_model, pretrained=True, dtype=base.dtype, build_adapted=build_adapted
    )


def resized_embeddings(base: nn.Module, adapter: Path) -> int | None:
    """The number of embeddings in the adapter, if it contains them for added tokens, so that the base has others."""
    rows = stored_embeddings(base, adapter) - {cast(Any, base).get_input_embeddings().num_embeddings}
    return rows.pop() if rows else None


def stored_embeddings(base: nn.Module, adapter: Path) -> set[int]:
    """The number of embeddings in the adapter; empty if it contains none."""
    from safetensors import safe_open

    embeddings = cast(Any, base).get_input_embeddings()
    name = next(name for name, part in base.named_modules() if part is embeddings)
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        names = {f"base_model.model.{name}.weight", f"base_model.model.{name}.base_layer.weight"} & set(file.keys())
        return {file.get_slice(saved).get_shape()[0] for saved in names}


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


def _from_directory(
    directory: Path, name: str, locations: SourceLocations, *, base_model: str | None = None
) -> LocatedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (directory / "config.json").is_file():
        fix = "name the directory of a Hugging Face causal language model"
        if (directory / FINAL_CHECKPOINT / MANIFEST_NAME).is_file():
            fix = f"name one of the checkpoints in it, such as {name.rstrip('/')}/{FINAL_CHECKPOINT}"
        elif (directory / MANIFEST_NAME).is_file():
            fix = "it contains the weights of a custom module; load them in your own code and pass the module"
        raise InvalidModel(f"{name} has no config.json; {fix}.")
    stored = any((directory / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json"))
    if locations.fetch_weights and not stored:
        raise InvalidModel(
            f"{name} has no model.safetensors; save it with save_pretrained (pickled weights are not read)."
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = str(error).replace(str(directory), name)  # hide the worker's path
        raise InvalidModel(f"The config of {name} cannot be read: {reason[:300]}") from error
    quantized_by = cast("dict[str, Any]", getattr(config, "quantization_config", None) or {}).get("quant_method")
    if quantized_by == "bitsandbytes":
        raise InvalidModel(
            f"The weights of {name} are already quantized by bitsandbytes; name the original model, and set "
            "lora.quantize to train on a 4-bit base."
        )
    dtype = getattr(config, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else None

    def build() -> nn.Module:
        if locations.fetch_weights:
            return _load(directory, name)
        return _build_module(lambda: cast(object, AutoModelForCausalLM.from_config(config, dtype=torch.float32)))

    build_mapped = partial(_load, directory, name, "auto") if locations.fetch_weights else None
    precision = stored_precision(directory) if locations.fetch_weights else None
    build_exact = None if precision is None else partial(_load, directory, name, precision)
    return LocatedModel(
        build,
        name,
        directory,
        base_model,
        pretrained=True,
        dtype=dtype or torch.float32,
        build_mapped=build_mapped,
        build_exact=build_exact,
    )


def _load(directory: Path, name: str, dtype: torch.dtype | Literal["auto"] = torch.float32) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise InvalidModel(
            f"The model {name} {lfs_pointer_fault(directory) or f'cannot be loaded: {error}'}"
        ) from error
    model, about = loaded
    missing = sorted(about["missing_keys"])
    if missing:
        raise InvalidModel(f"The weights of {name} lack {len(missing)} tensors, including {missing[0]}.")
    return cast(nn.Module, model)


def _from_builder(source: BuilderModel) -> LocatedModel:
    builders = tuple(entry_points(group="zeta.models", name=source.builder))
    if not builders:
        installed = ", ".join(sorted(entry_points(group="zeta.models").names)) or "none"
        raise InvalidModel(
            f"model.builder is {source.builder!r}, which is not installed here (installed: {installed})."
        )
    return LocatedModel(lambda: _build_module(lambda: builders[0].load()(**source.arguments)), source.builder)


def _build_module(build: Callable[[], object]) -> nn.Module:
    try:
        model = build()
    except Exception as error:
        raise InvalidModel(f"The model cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InvalidModel(f"The builder returned {type(model).__name__}, not an nn.Module.")
    return model
