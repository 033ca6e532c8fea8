"""Successive halving of a sweep: after some steps, only its best jobs continue, then only the best of those.

From K. Jamieson and A. Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (2016).
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field


class Halving(BaseModel):
    """When the jobs of a sweep are compared, and how many continue. A step is an optimizer step."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    steps: int = Field(ge=1, lt=2**53, description="the step at which all jobs are compared for the first time")
    factor: int = Field(
        default=2,
        ge=2,
        le=10,
        description="after a comparison, one job of so many continues (rounded up), and the next comparison is after "
        "so many times the steps",
    )

    def step_of(self, comparison: int) -> int:
        """The step of a comparison; the first one has the number 0."""
        return self.steps * self.factor**comparison

    def num_kept(self, num_jobs: int) -> int:
        """How many of the compared jobs continue."""
        return math.ceil(num_jobs / self.factor)
