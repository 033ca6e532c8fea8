"""What can be said of a job before it runs: the answer of ``POST /v1/jobs/validate``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from zeta_core.contract.job.check import CheckedData, Vocabulary
from zeta_core.contract.job.memory import MeasuredMemory, MemoryParts
from zeta_core.contract.spec.resolved_spec import RecordedSpec


class _Stored(BaseModel):
    """Frozen; a client keeps the fields of a newer server."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Bytes(_Stored):
    bytes: int
    meaning: str


class Memory(Bytes, MemoryParts):
    """Of each process, all parts together and each; ``measured`` is what an earlier job alike held, to compare."""

    measured: MeasuredMemory | None = None


class Seconds(_Stored):
    """``job`` is the earlier one that the time is taken from; ``tokens_per_second`` is what that made of its device."""

    seconds: float
    meaning: str
    job: str | None = None
    device: str | None = None
    tokens_per_second: float | None = None


class Estimate(_Stored):
    """A spec that would be accepted, and what follows from it; a null is explained in ``pending``."""

    object: Literal["validation"] = "validation"
    valid: Literal[True] = True
    resolved_spec: RecordedSpec
    parameters: int | None = Field(default=None, description="of the model, each shared tensor once")
    trainable_parameters: int | None = None
    steps: int | None = Field(default=None, description="optimizer steps")
    tokens: int | None = Field(default=None, description="trained on at most: full sequences")
    counted_by: str | None = Field(
        default=None, description="the earlier job on the same data, where steps and tokens are counted by it"
    )
    memory: Memory | None = Field(default=None, description="of the device")
    disk: Bytes | None = Field(default=None, description="of the artifact store")
    time: Seconds | None = Field(default=None, description="of the training, as an earlier job alike took it")
    data: CheckedData | None = Field(default=None, description="the checked rows of the dataset")
    vocabulary: Vocabulary | None = None
    isolates: bool | None = Field(default=None, description="whether the model keeps packed documents apart")
    pending: dict[str, str] = Field(default={}, description="why a field is null, by its name")
