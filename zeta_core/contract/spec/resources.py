"""The resources that a job requests from a worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import ByteSize, Field

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.spec.validation import StrictModel, invalid_value

Label = Annotated[str, Field(min_length=1, max_length=100)]


class Resources(StrictModel):
    gpus: Annotated[int, Field(ge=0, le=1024)] | Literal["all"] | None = Field(
        default=None,
        description="number of GPUs of one worker, with one training process each; `all` takes all GPUs of one model "
        "on a worker; unset: one per process on a worker with GPUs, else 0",
    )
    nodes: int = Field(default=1, ge=1, le=1024, description="number of machines")
    processes: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="number of training processes; on a CPU, each takes a slot, up to all slots of the worker; unset: "
        "one per GPU, or 1",
    )
    exact: bool = Field(
        default=False,
        description="wait for a worker with the same device kind, so that later attempts have bit-identical results; "
        "otherwise the job prefers one, and continues on another with the warning device_changed",
    )
    gpu_model: Label | None = Field(
        default=None,
        description="words in the name of the GPU, such as `H100` or `A100 80GB`; `zeta workers` lists the names; "
        "unset: any",
    )
    min_gpu_memory: ByteSize | None = Field(
        default=None,
        description="minimum memory of each GPU: a number of bytes, or text such as `80GB` or `40GiB`; unset: any",
    )
    labels: dict[Label, Label] = Field(
        default={}, max_length=16, description="labels that the worker must have (ZETA_WORKER_LABELS)"
    )

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # a dictionary of labels has no hash

    @property
    def processes_per_node(self) -> int | None:
        """The processes of a run on each machine; ``None`` if ``gpus`` is "all" and the job has no worker yet."""
        if self.processes is not None:
            return self.processes
        return None if self.gpus == "all" else max(1, self.gpus or 0)

    @property
    def num_processes(self) -> int | None:
        """The processes of a run: its world size; ``None`` if ``gpus`` is "all" and the job has no worker yet."""
        return None if self.processes_per_node is None else self.processes_per_node * self.nodes

    @property
    def requires_gpus(self) -> bool:
        """Whether the job can only run on GPUs; false if it may run on either."""
        return bool(self.gpus) or self.gpu_model is not None or self.min_gpu_memory is not None


def faults(resources: Resources) -> Iterator[ErrorDetail]:
    """One detail for every field that contradicts another."""
    if resources.processes is not None and resources.gpus and resources.processes != resources.gpus:
        fix = f"gpus is {resources.gpus!r}, and each GPU gets exactly one process; omit processes"
        yield invalid_value("resources.processes", resources.processes, fix)
    for name in ("gpu_model", "min_gpu_memory"):
        if resources.gpus == 0 and (value := getattr(resources, name)) is not None:
            yield invalid_value(f"resources.{name}", value, "gpus is 0, so no GPU is used; omit one of them")
