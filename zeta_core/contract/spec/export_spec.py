"""The spec of an export job: which checkpoint is exported, and in which format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT, NAME_PATTERN
from zeta_core.contract.spec.job_spec import Metadata
from zeta_core.contract.spec.resources import Resources
from zeta_core.contract.spec.sources import CheckpointName, JobModel
from zeta_core.contract.spec.validation import ModelWithRules, StrictModel, invalid_value
from zeta_core.contract.text import LINE_PATTERN, in_one_line

ExportFormat = Literal["merged", "adapter", "gguf"]
WeightType = Literal["f16", "bf16", "q8_0"]

# The types of weights that each format can store, the default first.
WEIGHT_TYPES: dict[ExportFormat, tuple[WeightType, ...]] = {
    "merged": ("bf16", "f16"),
    "adapter": (),  # peft loads an adapter in the type in which it was trained
    "gguf": ("f16", "bf16", "q8_0"),
}


class ExportRequest(StrictModel, ModelWithRules):
    """The body of ``POST /v1/jobs/{id}/exports``."""

    to: ExportFormat = Field(
        description="merged (a complete model as safetensors), adapter (a peft adapter) or gguf (one file for "
        "llama.cpp and Ollama)"
    )
    type: WeightType | None = Field(
        default=None,
        description="type of the weights; merged: bf16 (default) or f16; gguf: f16 (default), bf16 or q8_0",
    )
    checkpoint: CheckpointName = Field(default=FINAL_CHECKPOINT, description="step-N, best, final or latest")
    entity_name: (
        Annotated[
            str,
            Field(min_length=1, max_length=64, json_schema_extra={"pattern": LINE_PATTERN}),
            AfterValidator(in_one_line),
        ]
        | None
    ) = Field(default=None, description="a name for the export job")
    priority: int = Field(default=0, ge=-100, le=100, description="jobs with a higher priority start first")
    max_retries: int = Field(default=3, ge=0, le=100, description="consecutive failures that are retried")
    metadata: Metadata = Field(default={}, description="up to 16 strings of your own, for finding the job")

    def faults(self) -> list[ErrorDetail]:
        return list(_type_faults(self.to, self.type))


class ExportSpec(StrictModel, ModelWithRules):
    """The spec of an export job: an `ExportRequest` with the job that it was sent to."""

    model: JobModel
    to: ExportFormat
    type: WeightType | None = None
    entity_name: str | None = None
    priority: int = Field(default=0, ge=-100, le=100)
    max_retries: int = Field(default=3, ge=0, le=100)
    metadata: Metadata = Field(default={})

    def faults(self) -> list[ErrorDetail]:
        faults = list(_type_faults(self.to, self.type))
        if self.model.checkpoint != "latest" and not NAME_PATTERN.match(self.model.checkpoint):
            faults.append(invalid_value("checkpoint", self.model.checkpoint, "use step-N, best, final or latest"))
        return faults

    @property
    def resources(self) -> Resources:
        """An export runs in a background slot, without GPUs."""
        return Resources(gpus=0)

    @property
    def weight_type(self) -> WeightType | None:
        """The type of the exported weights; ``None`` for an adapter."""
        return self.type or next(iter(WEIGHT_TYPES[self.to]), None)


def _type_faults(to: ExportFormat, type_: WeightType | None) -> Iterator[ErrorDetail]:
    if type_ is None or type_ in WEIGHT_TYPES[to]:
        return
    if not WEIGHT_TYPES[to]:
        yield invalid_value("type", type_, f"an export to {to} keeps the type of the weights; omit it")
    else:
        yield invalid_value("type", type_, f"an export to {to} supports {' and '.join(WEIGHT_TYPES[to])}")


assert set(WEIGHT_TYPES) == set(get_args(ExportFormat)), "every format has its types"
