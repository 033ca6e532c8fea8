"""The sources of a job's data, model and tokenizer; a key of each object determines its kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Discriminator, Field, JsonValue, Tag, TypeAdapter, WithJsonSchema

from zeta_core.contract.identifiers import NEW_ID_PATTERN, is_hub_dataset
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT
from zeta_core.contract.spec.validation import NOT_ONE_KIND, StrictModel

DataFormat = Literal["auto", "text", "messages", "prompt_completion", "preference", "unpaired_preference", "tokens"]
# The methods that learn preferences, and the format of the rows that each of them reads.
PREFERENCE_FORMATS: dict[str, Literal["preference", "unpaired_preference"]] = {
    "dpo": "preference",
    "kto": "unpaired_preference",
    "orpo": "preference",
}
# The standard names of the columns that the formats read.
COLUMNS = (
    "text",
    "messages",
    "tools",
    "functions",
    "system",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "label",
    "input_ids",
    "labels",
    "completion_mask",
    "assistant_masks",
    "attention_mask",
)


# Ordinary specs stay far below these limits. They bound the lookups that one request causes.
MAX_FILES = 1000  # per source
MAX_SOURCES = 64
Id = Annotated[str, Field(max_length=100)]
# Other texts are accepted here, and rejected by the server as names of files, jobs and checkpoints that do not exist.
FileId = Annotated[Id, WithJsonSchema({"type": "string", "pattern": NEW_ID_PATTERN.format(prefix="file")})]
JobId = Annotated[Id, WithJsonSchema({"type": "string", "pattern": NEW_ID_PATTERN.format(prefix="job")})]
CheckpointName = Annotated[
    Id, WithJsonSchema({"type": "string", "pattern": r"^(step-(0|[1-9][0-9]{0,17})|best|final|latest)$"})
]
Path = Annotated[str, Field(min_length=1, max_length=4096)]  # PATH_MAX of Linux


# --- Data -------------------------------------------------------------------------------------------------------------


class _Source(StrictModel):
    format: DataFormat = Field(default="auto", description="the format of the rows; auto detects it from the columns")
    columns: dict[Annotated[str, Field(max_length=200)], Annotated[str, Field(max_length=1000)]] = Field(
        default={},
        max_length=2 * len(COLUMNS),
        description="standard column names and the data's names for them, such as {'text': 'body'}",
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="share of the sequences, relative to the other sources; unset: every sequence equally often",
    )
    drop_columns: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default=[],
        max_length=100,
        description="columns to ignore although they look like a part of the prompt or like a mask",
    )
    dtype: Literal["uint8", "uint16", "int32", "uint32", "int64", "uint64"] | None = Field(
        default=None,
        description="type of the ids in a .bin file; unset: from its header, its index or its contents",
    )
    drop_fields: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default=[],
        max_length=100,
        description="fields of turns to ignore, such as 'reasoning_content'; the chat template must render all others",
    )
    allow_control_tokens: bool = Field(
        default=False,
        description="encode control tokens in texts, such as <|im_end|>, as tokens instead of as text",
    )


class FileSource(_Source):
    """An uploaded file, or several that are read one after the other."""

    file: FileId | Annotated[list[FileId], Field(min_length=1, max_length=MAX_FILES)] = Field(
        description="id of an uploaded file, or a list of ids that are read in this order"
    )

    @property
    def file_ids(self) -> list[str]:
        return [self.file] if isinstance(self.file, str) else list(self.file)


class PathSource(_Source):
    """A file, folder or glob under the worker's ``ZETA_DATA_ROOT``; in a Trainer, any path."""

    path: Path = Field(
        description="a file, a folder or a glob under the worker's ZETA_DATA_ROOT; in a Trainer, any path"
    )


# Names that neither `datasets` nor the Hub interprets as a path, a pattern or an address.
_CONFIG_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+ -]*")
_SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+:%\[\] -]*")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*|refs/(pr/\d+|convert/\w+)")


def _hub_dataset(hub: str) -> str:
    if not is_hub_dataset(hub):
        raise ValueError(
            "it must be a dataset on the Hub, 'owner/name'; use {\"path\": …} for a file, or upload it with "
            "POST /v1/files"
        )
    return hub


def _plain(pattern: re.Pattern[str], example: str) -> AfterValidator:
    def check(name: str) -> str:
        if pattern.fullmatch(name) is None or ".." in name:
            raise ValueError(f"it must be a plain name, such as {example!r}, not a path or an address")
        return name

    return AfterValidator(check)


class HubSource(_Source):
    hub: Annotated[str, Field(max_length=300), AfterValidator(_hub_dataset)] = Field(
        description="a dataset on the Hugging Face Hub, 'owner/name'"
    )
    config: Annotated[str, Field(max_length=300), _plain(_CONFIG_NAME, "wikitext-2-v1")] | None = Field(
        default=None, description="configuration of the dataset; unset: its only or default one"
    )
    split: Annotated[str, Field(max_length=300), _plain(_SPLIT, "train[:10%]")] = Field(
        default="train", description="split of the dataset, also a slice such as 'train[:10%]'"
    )
    revision: Annotated[str, Field(max_length=300), _plain(_REVISION, "main")] | None = Field(
        default=None, description="branch, tag or commit; unset: the default branch"
    )


class BuiltinSource(_Source):
    builtin: Literal["python-docs"] = Field(description="the Python language reference that comes with CPython")


def _tag(kind: str) -> str:
    """The name of a union's member, in brackets to distinguish it from a field in an error's location."""
    return f"<{kind}>"


def _kind(value: Any, kinds: tuple[str, ...]) -> str | None:
    """The union member for ``value``: the kind that it has as a field; None if it has none or several.

    A value that is not an object is validated as the first kind, which reports its type.
    """
    keys = value if isinstance(value, dict) else vars(value) if isinstance(value, BaseModel) else kinds[:1]
    named = [kind for kind in kinds if kind in keys]
    return _tag(named[0]) if len(named) == 1 else None


def _distinguished_by(kind: Callable[[Any], str | None], kinds: tuple[str, ...]) -> Discriminator:
    """Selects the member of a union. `validation` writes the message if an object has no kind or several."""
    return Discriminator(kind, custom_error_type=NOT_ONE_KIND, custom_error_message=" ".join(kinds))


_SOURCES = ("file", "path", "hub", "builtin")


def _source_kind(value: Any) -> str | None:
    return _kind(value, _SOURCES)


DatasetSource = Annotated[
    Annotated[FileSource, Tag("<file>")]
    | Annotated[PathSource, Tag("<path>")]
    | Annotated[HubSource, Tag("<hub>")]
    | Annotated[BuiltinSource, Tag("<builtin>")],
    _distinguished_by(_source_kind, _SOURCES),
]
Dataset = Annotated[
    Annotated[DatasetSource, Tag("<one>")]
    | Annotated[list[DatasetSource], Field(min_length=1, max_length=MAX_SOURCES), Tag("<list>")],
    Discriminator(lambda value: _tag("list" if isinstance(value, list) else "one")),
]

# --- Model and tokenizer ----------------------------------------------------------------------------------------------


class ConfigModel(StrictModel):
    """A model with random weights, built from a Hugging Face config; ``model_type`` names its architecture."""

    config: dict[str, JsonValue] = Field(description="a Hugging Face config with its model_type")


class JobModel(StrictModel):
    """The weights of an earlier job's checkpoint."""

    job: JobId = Field(description="id of the job whose weights are used")
    checkpoint: Id = Field(default=FINAL_CHECKPOINT, description="step-N, best or final")


class FileModel(StrictModel):
    """An uploaded .tar of a Hugging Face directory, or an uploaded .gguf file."""

    file: FileId = Field(description="id of an uploaded .tar of a Hugging Face directory or of a .gguf file")


class BuilderModel(StrictModel):
    """A function installed on the workers under the entry-point group ``zeta.models``."""

    builder: str = Field(
        min_length=1, max_length=300, description="name of a function that is installed on the workers (zeta.models)"
    )
    arguments: dict[str, JsonValue] = Field(default={}, description="keyword arguments of the function")


_MODELS = ("config", "job", "file", "builder")


def _model_kind(value: Any) -> str | None:
    return _tag("hub") if isinstance(value, str) else _kind(value, _MODELS)


HubModel = Annotated[str, Field(min_length=1, max_length=300)]
ModelSource = Annotated[
    Annotated[HubModel, Tag("<hub>")]
    | Annotated[ConfigModel, Tag("<config>")]
    | Annotated[JobModel, Tag("<job>")]
    | Annotated[FileModel, Tag("<file>")]
    | Annotated[BuilderModel, Tag("<builder>")],
    _distinguished_by(_model_kind, _MODELS),
]
MODEL_SOURCE: TypeAdapter[ModelSource] = TypeAdapter(ModelSource)


class NamedModel(StrictModel):
    """A model that a script describes by an object, as a job does."""

    model: ModelSource


class FileTokenizer(StrictModel):
    file: FileId


class BuiltinTokenizer(StrictModel):
    builtin: Literal["bytes"]


_TOKENIZERS = ("file", "builtin")


def _tokenizer_kind(value: Any) -> str | None:
    return _tag("hub") if isinstance(value, str) else _kind(value, _TOKENIZERS)


TokenizerSource = Annotated[
    Annotated[HubModel, Tag("<hub>")]
    | Annotated[FileTokenizer, Tag("<file>")]
    | Annotated[BuiltinTokenizer, Tag("<builtin>")],
    _distinguished_by(_tokenizer_kind, _TOKENIZERS),
]

# Fields whose objects have one of several kinds, and the keys that determine the kind.
KINDS: dict[str, tuple[str, ...]] = {
    "model": _MODELS,
    "dataset": _SOURCES,
    "eval_dataset": _SOURCES,
    "tokenizer": _TOKENIZERS,
}


def context_limit(model: ModelSource) -> int | None:
    """The number of positions that a given config allows, in tokens; ``None`` if it doesn't state it."""
    if not isinstance(model, ConfigModel):
        return None
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"):
        value = model.config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def dataset_sources(dataset: Dataset | None) -> list[DatasetSource]:
    """The sources of a dataset; an empty list for ``None``."""
    if dataset is None:
        return []
    return list(dataset) if isinstance(dataset, list) else [dataset]


def named_sources(param: str, dataset: Dataset | None) -> Iterator[tuple[str, DatasetSource]]:
    """Each source of the field ``param``, preceded by its path in the spec: ``dataset``, or ``dataset.0`` in a list."""
    for index, source in enumerate(dataset_sources(dataset)):
        yield f"{param}.{index}" if isinstance(dataset, list) else param, source
