"""The resolved spec of a job: its spec with all defaults decided, and the facts that determined them.

The server writes it when it accepts a job (`defaults.resolve`), assigns the job to a worker, and stores the run's
own report. A worker passes it to the run. The database, messages, ``run.json`` and the API hold it as a
plain JSON object. Missing fields stay missing. Unknown fields that another version wrote are kept. Values of a type
that this version does not know are kept as well, but attributes and `ResolvedSpec.value` read them as missing.
"""

from __future__ import annotations

from collections.abc import KeysView
from typing import TYPE_CHECKING, Annotated, Any, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT
from zeta_core.contract.spec.resources import Resources

if TYPE_CHECKING:
    from zeta_core.contract.spec.sources import JobModel


_DECIDED_BY_SERVER = frozenset({"model", "files", "resources", "held_out"})


class _Recorded(BaseModel):
    """Frozen; unset fields are omitted when it is written, and unknown fields are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=False)

    @model_serializer(mode="plain")
    def _set_fields(self) -> dict[str, Any]:
        declared = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return declared | (self.model_extra or {})


class UploadedFile(_Recorded):
    """An uploaded file that the job reads."""

    filename: str
    sha256: str | None = None
    purpose: str | None = None
    bytes: int | None = None


class ResolvedResources(_Recorded, Resources):
    """The resources of a job; once the job is dispatched, ``gpus`` is set."""

    # overrides the strict configuration that `Resources` inherits
    model_config = ConfigDict(frozen=True, extra="allow", strict=False)


class ResolvedSpec(_Recorded):
    """The fields that are decided, and the facts that are recorded with them; ``None``: not known yet.

    All other fields of the spec are kept as they were submitted (`value`). A field can also be read as in a dict, as
    ``resolved["learning_rate"]``, because users of the client know it as a JSON object.
    """

    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    # Decided by the server.
    model: JsonValue = None
    files: dict[str, UploadedFile] = {}
    resources: ResolvedResources | None = None
    save_total_limit: int | None = None

    # Decided by the spec, or by the run when the model and the data are known.
    batch_size: int | None = None
    gradient_accumulate_every: int | None = None
    batch_size_origin: str | None = None
    global_batch_size: int | None = None
    seq_len: int | None = None
    pack: bool | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    warmup_steps: int | float | None = None
    seed: int | None = None
    eval_steps: int | None = None
    train_on: str | None = None
    mixed_precision: str | None = None

    # Recorded by the run.
    run_id: str | None = None
    device: str | None = None
    device_kind: str | None = None
    threads: int | None = None
    world_size: int | None = None
    first_world_size: int | None = None
    dtype: str | None = None
    strategy: str | None = None
    num_parameters: int | None = None
    num_trained_parameters: int | None = None
    total_steps: int | None = None
    total_sequences: int | None = None
    eval_documents: int | None = None
    eval_tokens: int | None = None
    template_date: str | None = None
    data_fingerprint: str | None = None
    base_fingerprint: str | None = None
    versions: dict[str, str] = {}
    data_report: dict[str, JsonValue] | None = None

    _unreadable: dict[str, Any] = PrivateAttr(default_factory=dict[str, Any])

    @model_validator(mode="wrap")
    @classmethod
    def _set_unreadable_values_aside(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            if not isinstance(values, dict):
                raise
            recorded = cast("dict[str, Any]", values)
            names = {str(fault["loc"][0]) for fault in error.errors() if fault["loc"]} & recorded.keys()
            resolved = handler({name: value for name, value in recorded.items() if name not in names})
            resolved._unreadable.update({name: recorded[name] for name in names})
            return resolved

    @model_serializer(mode="plain")
    def _all_fields(self) -> dict[str, Any]:
        return self._set_fields() | self._unreadable

    @property
    def job_model(self) -> JobModel | None:
        """The checkpoint of another job from which the model is read; ``None`` for other models."""
        if not isinstance(self.model, dict) or "job" not in self.model:
            return None
        from zeta_core.contract.spec.sources import JobModel  # loading all kinds of sources takes time

        return JobModel(job=str(self.model["job"]), checkpoint=str(self.model.get("checkpoint", FINAL_CHECKPOINT)))

    @property
    def num_sequences(self) -> int | None:
        """The number of sequences in an epoch, once the run has counted them."""
        sequences = (self.data_report or {}).get("sequences")
        return sequences if isinstance(sequences, int) else None

    def updated(self, later: ResolvedSpec) -> Self:
        """This spec, updated with the fields of ``later``."""
        return type(self).model_validate(self.as_json() | later.as_json())

    def with_report(self, report: ResolvedSpec) -> Self:
        """This spec, updated with a run's report, which can't change what the server has decided.

        A run that was taken over could otherwise let its next attempt read another project's checkpoint.
        """
        reported = {name: value for name, value in report.as_json().items() if name not in _DECIDED_BY_SERVER}
        return type(self).model_validate(self.as_json() | reported)

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def value(self, name: str) -> Any:
        """The value of any field of the spec, or None."""
        return getattr(self, name) if name in type(self).model_fields else (self.model_extra or {}).get(name)

    def __getitem__(self, name: str) -> Any:
        return self.as_json()[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.as_json().get(name, default)

    def keys(self) -> KeysView[str]:
        return self.as_json().keys()

    def __contains__(self, name: object) -> bool:
        return name in self.model_fields_set or name in self._unreadable


# The type of a field of another model. FastAPI would describe every model class that it finds in an annotation.
if TYPE_CHECKING:
    RecordedSpec = ResolvedSpec
else:
    RecordedSpec = Annotated[
        Any,
        PlainValidator(ResolvedSpec.model_validate),
        PlainSerializer(ResolvedSpec.as_json),
        WithJsonSchema({"type": "object", "additionalProperties": True}),
    ]
