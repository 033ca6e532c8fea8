"""Estimates for a job before it runs: the response of ``POST /v1/jobs/validate``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from zeta_core.contract.job.check import CheckedData, Vocabulary
from zeta_core.contract.job.memory import MeasuredMemory, MemoryParts
from zeta_core.contract.spec.resolved_spec import RecordedSpec


class _EstimateModel(BaseModel):
    """Frozen. Clients keep the unknown fields of a newer server."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Bytes(_EstimateModel):
    bytes: int
    meaning: str


class Memory(Bytes, MemoryParts):
    """The memory of each process, in total and by part; ``measured`` is that of a comparable earlier job."""

    measured: MeasuredMemory | None = None


class Seconds(_EstimateModel):
    """``job`` is the earlier job from which the time is derived, and ``tokens_per_second`` its speed on ``device``."""

    seconds: float
    meaning: str
    job: str | None = None
    device: str | None = None
    tokens_per_second: float | None = None


class Estimate(_EstimateModel):
    """A valid spec and the estimates for it; ``pending`` explains each null."""

    object: Literal["validation"] = "validation"
    valid: Literal[True] = True
    resolved_spec: RecordedSpec
    parameters: int | None = Field(default=None, description="of the model; a shared tensor counts once")
    trainable_parameters: int | None = None
    steps: int | None = Field(default=None, description="optimizer steps")
    tokens: int | None = Field(default=None, description="upper bound of the tokens trained on: full sequences")
    counted_by: str | None = Field(
        default=None, description="the earlier job on the same data from which steps and tokens are derived"
    )
    memory: Memory | None = Field(default=None, description="of the device")
    disk: Bytes | None = Field(default=None, description="of the artifact store")
    time: Seconds | None = Field(default=None, description="of the run, derived from a comparable earlier job")
    data: CheckedData | None = Field(default=None, description="the checked rows of the dataset")
    vocabulary: Vocabulary | None = None
    isolates: bool | None = Field(default=None, description="whether the model keeps packed documents apart")
    pending: dict[str, str] = Field(default={}, description="the reasons why fields are null, by field")
