"""A sweep: jobs with the same spec except for some settings, created together and compared by their loss."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.job.halving import Halving
from zeta_core.contract.job.status import JobStatus, StatusReason
from zeta_core.contract.spec.validation import ModelWithRules, shown

MAX_JOBS = 100  # of a sweep
MAX_COMBINATIONS = 10**9  # of a grid from which some are chosen at random
MAX_DEPTH = 10  # of a field in a grid; those of a spec are less deep

Settings = dict[str, JsonValue]  # by the dotted names of fields, such as ``lora.r``


class SweepRequest(ModelWithRules):
    """The body of ``POST /v1/sweeps``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    spec: dict[str, JsonValue] = Field(description="a `JobSpec`; its required fields may be in the grid instead")
    grid: dict[str, list[JsonValue]] = Field(
        min_length=1,
        description="the values of each field by its dotted name, such as {'lora.r': [8, 16]}",
        json_schema_extra={"additionalProperties": {"type": "array", "minItems": 1, "uniqueItems": True}},
    )
    random: int | None = Field(
        default=None, ge=1, le=MAX_JOBS, description="create only this many of the grid's combinations"
    )
    seed: int | None = Field(default=None, ge=0, lt=2**53, description="the seed of the random choice; default 0")
    halving: Halving | None = Field(
        default=None, description="successive halving: compare the jobs early, and continue only the best ones"
    )

    @property
    def num_combinations(self) -> int:
        return math.prod(len(values) for values in self.grid.values())

    def faults(self) -> list[ErrorDetail]:
        faults = [
            _fault(f"grid.{name}", problem)
            for name, values in self.grid.items()
            if (problem := _problem(name, values)) is not None
        ]
        total = self.num_combinations
        if self.random is None and self.seed is not None:
            message = f"seed is {self.seed}, but nothing is chosen at random; remove it, or set random."
            faults.append(_fault("seed", message))
        if self.halving is not None:
            faults += self._halving_faults(self.halving)
        if faults:
            return faults
        if self.random is None and total > MAX_JOBS:
            message = f"The grid has {total} combinations, and a sweep has at most {MAX_JOBS} jobs; set random."
            return [_fault("grid", message)]
        if self.random is not None and self.random > total:
            message = f"random is {self.random}, but the grid has {total} combinations; remove random."
            return [_fault("random", message)]
        if total > MAX_COMBINATIONS:
            return [_fault("grid", f"The grid has more than {MAX_COMBINATIONS:,} combinations; remove some values.")]
        return []

    def _halving_faults(self, halving: Halving) -> list[ErrorDetail]:
        if min(self.num_combinations, self.random or MAX_JOBS) < 2:
            return [_fault("halving", "The sweep has one job, and halving compares several; remove halving.")]
        listed = self.grid.get("max_steps", [self.spec.get("max_steps")])
        limits = [steps for steps in listed if isinstance(steps, int)]
        if limits and max(limits) <= halving.steps:
            end = f"the jobs end after max_steps={max(limits)}; choose a smaller number"
            return [_fault("halving.steps", f"halving.steps is {halving.steps}, but {end}.")]
        return []

    def combinations(self) -> list[Settings]:
        """The settings of each job: all combinations, or those chosen at random, in the order of the grid."""
        numbers: Sequence[int] = range(self.num_combinations)
        if self.random is not None:
            numbers = sorted(random.Random(self.seed or 0).sample(numbers, self.random))
        return [self._combination(number) for number in numbers]

    def _combination(self, number: int) -> Settings:
        """The combination with this number, from 0; the last field changes fastest."""
        chosen: list[tuple[str, JsonValue]] = []
        for name, values in reversed(self.grid.items()):
            number, index = divmod(number, len(values))
            chosen.append((name, values[index]))
        return dict(reversed(chosen))


def _fault(param: str, message: str) -> ErrorDetail:
    return ErrorDetail(param=param, message=message, code="invalid_value")


def _problem(name: str, values: Sequence[JsonValue]) -> str | None:
    if not all(name.split(".")) or name.count(".") > MAX_DEPTH:
        return (
            f"grid has the field {shown(name)}; write the name of a field of the spec, such as learning_rate or lora.r."
        )
    if not values:
        return f"grid.{name} has no values; list at least one."
    if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
        return f"grid.{name} lists a value more than once; remove the repetitions."
    return None


def with_settings(spec: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the spec with these settings. Raises `ValueError` if a field within a name is not an object."""
    changed: dict[str, Any] = json.loads(json.dumps(spec))
    for name, value in settings.items():
        *parents, last = name.split(".")
        at: dict[str, Any] = changed
        for depth, parent in enumerate(parents, 1):
            if at.get(parent) is None:
                at[parent] = {}
            inner: Any = at[parent]
            if not isinstance(inner, dict):
                raise ValueError(f"{'.'.join(parents[:depth])} is not an object, so {name} can't be set")
            at = cast("dict[str, Any]", inner)
        at[last] = value
    return changed


class SweepJob(BaseModel):
    """A job of a sweep: its settings and its newest figures. Losses are means per trained token in nats."""

    model_config = ConfigDict(frozen=True, extra="allow")

    id: str
    settings: Settings
    status: JobStatus
    status_reason: StatusReason | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = Field(default=None, description="the mean over the last 50 steps")
    eval_loss: float | None = Field(default=None, description="the newest loss on held-out data")


class Sweep(BaseModel):
    """A sweep without its jobs. Deleted jobs are not counted."""

    model_config = ConfigDict(frozen=True, extra="allow")

    id: str
    object: Literal["sweep"] = "sweep"
    project: str
    created_by: str
    created_at: datetime
    fields: list[str] = Field(description="the dotted names of the fields that differ between the jobs")
    num_jobs: dict[JobStatus, int] = Field(
        description="the number of jobs with each status; statuses without jobs are missing"
    )
    halving: Halving | None = Field(default=None, description="successive halving, if the sweep uses it")
    next_comparison_step: int | None = Field(
        default=None, description="the step at which the jobs are compared next; null if no comparison is left"
    )


class SweepResult(Sweep):
    """A sweep with its jobs, in the order of their creation."""

    jobs: list[SweepJob]
    metric: Literal["eval_loss", "loss"] = Field(
        description="what `best` compares: eval_loss if every job that succeeded has one, otherwise loss"
    )
    best: str | None = Field(default=None, description="the succeeded job with the lowest metric")
