"""The spec of an evaluation: a checkpoint, the file to evaluate it on, and how training reads this file."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import Field

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT
from zeta_core.contract.spec.job_spec import Metadata
from zeta_core.contract.spec.options import Quantization
from zeta_core.contract.spec.resources import Resources, one_process_faults
from zeta_core.contract.spec.sources import CheckpointName, FileId, FileSource, JobModel, ModelSource
from zeta_core.contract.spec.validation import ModelWithRules, StrictModel
from zeta_core.contract.text import Line


class NewEvaluation(StrictModel):
    """The body of ``POST /v1/jobs/{id}/evaluations``."""

    file: FileId = Field(description="id of an uploaded file with purpose dataset")
    checkpoint: CheckpointName = Field(default=FINAL_CHECKPOINT, description="step-N, best, final or latest")
    base: bool = Field(default=False, description="also evaluate the model that the job started from")
    entity_name: Line | None = None
    priority: int = Field(default=0, ge=-100, le=100)
    max_retries: int = Field(default=3, ge=0, le=100)
    metadata: Metadata = Field(default={})


class EvaluationSpec(StrictModel, ModelWithRules):
    """The server creates it from a `NewEvaluation` and the spec of the job.

    ``fingerprint`` is the SHA-256 of the checkpoint's manifest. ``base`` is the model to compare with. The fields from
    ``dataset`` on determine the tokens, as in the job; the chat template is that of the checkpoint's tokenizer.
    ``template_date`` is the date that the job's chat template rendered.
    """

    model: JobModel
    fingerprint: str
    quantize: Quantization | None = None
    base: ModelSource | None = None
    dataset: FileSource
    seq_len: int = Field(ge=2)
    use_pretokenized: bool = False
    train_on: Literal["assistant", "completion", "all"] | None = None
    overlong: Literal["error", "truncate", "drop"] | None = None
    template_date: date | None = Field(default=None, strict=False)  # JSON has no dates
    entity_name: str | None = None
    priority: int = Field(default=0, ge=-100, le=100)
    max_retries: int = Field(default=3, ge=0, le=100)
    resources: Resources = Resources()
    metadata: Metadata = Field(default={})

    def faults(self) -> list[ErrorDetail]:
        return list(one_process_faults(self.resources))
