"""The resources that a job requests."""

from __future__ import annotations

from pydantic import Field

from zeta_core.contract.spec.validation import StrictModel


class Resources(StrictModel):
    gpus: int | None = Field(
        default=None, ge=0, le=1024, description="number of GPUs; unset: 1 on a worker with GPUs, else 0"
    )
    nodes: int = Field(default=1, ge=1, le=1024, description="number of machines")
    processes: int | None = Field(
        default=None, ge=1, le=1024, description="number of training processes; unset: one per GPU, or 1"
    )
    exact: bool = Field(
        default=False,
        description="wait for a worker with the same device kind, so that later attempts have bit-identical results; "
        "otherwise the job prefers one, and continues on another with the warning device_changed",
    )

    @property
    def num_processes(self) -> int:
        """The processes of a run: its world size."""
        return self.processes or max(1, self.gpus or 1) * self.nodes
