"""The job spec: the Trainer's options, and the fields that only a service needs.

`TrainerOptions` has the same fields in ``zeta.Trainer`` and in ``POST /v1/jobs``. Both models reject unknown fields.
`validation.parse` reports every invalid field, with its value and the fix, in one error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.identifiers import is_hub_id, is_id
from zeta_core.contract.job.checkpoint import NAME_PATTERN
from zeta_core.contract.model_json.config import clean_config
from zeta_core.contract.model_json.faults import InvalidModelFiles, JsonLocation
from zeta_core.contract.spec import option_rules
from zeta_core.contract.spec.affects import Affects
from zeta_core.contract.spec.deepspeed import fault_in_a_job
from zeta_core.contract.spec.notify import Notify
from zeta_core.contract.spec.options import OptionFields
from zeta_core.contract.spec.resources import Elastic, Resources
from zeta_core.contract.spec.resources import faults as resource_faults
from zeta_core.contract.spec.sources import BuilderModel, ConfigModel, Dataset, ModelSource, context_limit
from zeta_core.contract.spec.validation import ModelWithRules, invalid_value
from zeta_core.contract.text import LINE_PATTERN, TEXT_PATTERN
from zeta_core.contract.webhooks import MAX_NOTIFICATIONS

# The JSON parser rejects control characters (`strict_json`); the patterns describe this to clients.
Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=64)],
        Annotated[str, Field(max_length=512, json_schema_extra={"pattern": TEXT_PATTERN})],
    ],
    Field(max_length=16, json_schema_extra={"propertyNames": {"maxLength": 64, "pattern": LINE_PATTERN}}),
]


class TrainerOptions(OptionFields, ModelWithRules):
    """Every parameter of ``Trainer`` except the model. ``None`` stands for the documented default.

    A step is an optimizer step; a global batch is ``batch_size`` x ``gradient_accumulate_every`` x processes sequences
    of ``seq_len`` tokens.
    """

    def faults(self) -> list[ErrorDetail]:
        return list(option_rules.faults(self))


class JobSpec(TrainerOptions):
    """The body of ``POST /v1/jobs``."""

    model: Annotated[ModelSource, Affects("results", "documents", "sequences", "speed")] = Field(
        description="a Hub id, or {'config': ...} (from scratch), {'job': ..., 'checkpoint': ...}, {'file': ...} or "
        "{'builder': ...}"
    )
    dataset: Annotated[Dataset, Affects("results", "documents", "sequences")] = Field(  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
        description="the training data: a source, or a list of sources"
    )
    resources: Annotated[Resources, Affects()] = Field(
        default=Resources(), description="what the job needs from a worker"
    )
    elastic: Annotated[Elastic | None, Affects()] = Field(
        default=None,
        description="the numbers of machines on which later attempts may continue, as {'min_nodes': ..., 'max_nodes': "
        "...}; unset: always resources.nodes",
    )
    priority: Annotated[int, Affects()] = Field(
        default=0, ge=-100, le=100, description="jobs with a higher priority start first"
    )
    max_retries: Annotated[int, Affects()] = Field(
        default=3, ge=0, le=100, description="consecutive failures without a new checkpoint that are retried"
    )
    time_limit_seconds: Annotated[float | None, Affects()] = Field(
        default=None, gt=0, allow_inf_nan=False, description="running time over all attempts; unset: unlimited"
    )
    metadata: Annotated[Metadata, Affects()] = Field(
        default={}, description="up to 16 strings of your own, for finding the job"
    )
    notify: Annotated[list[Notify], Affects()] = Field(
        default=[],
        max_length=MAX_NOTIFICATIONS,
        description="who is notified about the job: webhooks, URLs and e-mail addresses, as {'to': ..., 'events': ...}",
    )

    placeholders: ClassVar[dict[str, Any]] = {"model": "org/name", "dataset": {"path": "data"}}

    def faults(self) -> list[ErrorDetail]:
        return [*super().faults(), *self._job_faults(), *self._model_faults()]

    def _job_faults(self) -> Iterator[ErrorDetail]:
        """Values that a Trainer accepts and a job does not."""
        yield from resource_faults(self.resources)
        if self.resume_from_checkpoint is not None:
            job_id, _, name = self.resume_from_checkpoint.partition("/")
            if not is_id(job_id, "job") or (name and not NAME_PATTERN.match(name)):
                fix = "it is not a job's checkpoint; use 'job_...' or 'job_.../step-N'"
                yield invalid_value("resume_from_checkpoint", self.resume_from_checkpoint, fix)
        if self.elastic is not None and self.use_deepspeed:
            fix = "a run with DeepSpeed continues only on the same number of processes; omit elastic, or use use_fsdp"
            yield invalid_value("elastic", self.elastic.model_dump(), fix)
        fix = fault_in_a_job(self.use_deepspeed)
        if fix is not None:
            yield invalid_value("use_deepspeed", self.use_deepspeed, fix)
        if self.output_dir is not None and not _is_relative_inside(self.output_dir):
            fix = "it is outside the job's artifacts; use a relative name such as 'models'"
            yield invalid_value("output_dir", self.output_dir, fix)

    def _model_faults(self) -> Iterator[ErrorDetail]:
        """Names and configs that a library could read as a path or address on the worker's machine, or as code."""
        for param, value in (("model", self.model), ("tokenizer", self.tokenizer)):
            if isinstance(value, str) and not is_hub_id(value):
                fix = "it is not a Hub id; use 'org/name' or 'org/name@revision', or upload it with POST /v1/files"
                yield invalid_value(param, value, fix)
        continues = self.lora is not None and self.lora.continue_adapter
        if continues and isinstance(self.model, ConfigModel | BuilderModel):
            fix = (
                "the given model is built without an adapter; name the checkpoint of a job that trained one, or omit it"
            )
            yield invalid_value("lora.continue_adapter", True, fix)
        if not isinstance(self.model, ConfigModel):
            return
        try:
            clean_config(self.model.config, JsonLocation("model.config", origin="spec"))
        except InvalidModelFiles as error:
            yield ErrorDetail(param=error.param, message=error.message, code="invalid_value")
        if not self.model.config.get("model_type"):
            message = "model.config.model_type is required; add it, such as 'llama'."
            yield ErrorDetail(param="model.config.model_type", message=message, code="missing_field")
        limit = context_limit(self.model)
        if self.seq_len is not None and limit is not None and self.seq_len > limit:
            fix = f"the given model config has {limit} positions; use at most {limit}, or raise the config's limit"
            yield invalid_value("seq_len", self.seq_len, fix)


def _is_relative_inside(path: str) -> bool:
    parts = path.replace("\\", "/").split("/")
    return not path.startswith(("/", "~", "\\")) and ".." not in parts and ":" not in path and "\0" not in path
