"""The resources that a job requests from a worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import ByteSize, Field

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.spec.validation import StrictModel, invalid_value

Label = Annotated[str, Field(min_length=1, max_length=100)]
MAX_GPU_MEMORY = 2**50  # bytes; much larger numbers overflow the float that messages show


class Resources(StrictModel):
    gpus: Annotated[int, Field(ge=0, le=1024)] | Literal["all"] | None = Field(
        default=None,
        description="number of GPUs of each machine, with one training process each; `all` takes all GPUs of one model "
        "on a worker; unset: one per process on a worker with GPUs, else 0",
    )
    nodes: int = Field(default=1, ge=1, le=1024, description="number of machines, each a worker of its own")
    processes: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="number of training processes of each machine; on a CPU, each takes a slot, up to all slots of the "
        "worker; unset: "
        "one per GPU, or 1",
    )
    exact: bool = Field(
        default=False,
        description="wait for a worker with the same device kind, so that later attempts can have bit-identical "
        "results (on GPUs with 'deterministic'); otherwise the job prefers one, and continues on another with the "
        "warning device_changed",
    )
    gpu_model: Label | None = Field(
        default=None,
        description="words in the name of the GPU, such as `H100` or `A100 80GB`; `zeta workers` lists the names; "
        "unset: any",
    )
    min_gpu_memory: Annotated[ByteSize, Field(le=MAX_GPU_MEMORY)] | None = Field(
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


class Elastic(StrictModel):
    """The numbers of machines on which later attempts of a job may continue."""

    min_nodes: int = Field(ge=1, le=1024, description="minimum number of machines")
    max_nodes: int = Field(ge=1, le=1024, description="maximum number of machines")


def node_counts(resources: Resources, elastic: Elastic | None, global_batch_size: int | None) -> list[int]:
    """The numbers of machines on which an attempt may run, the largest first.

    With `Elastic`, they are those between its limits whose processes divide the global batch, in sequences, equally.
    """
    processes = resources.processes_per_node
    if elastic is None or processes is None or global_batch_size is None:
        return [resources.nodes]
    numbers = range(elastic.max_nodes, elastic.min_nodes - 1, -1)
    return [nodes for nodes in numbers if global_batch_size % (nodes * processes) == 0]


def elastic_faults(
    resources: Resources, elastic: Elastic | None, global_batch_size: int | None
) -> Iterator[ErrorDetail]:
    """One detail for every number of machines that ``elastic`` contradicts, or that does not divide the batch."""
    if elastic is None:
        return
    low, high, value = elastic.min_nodes, elastic.max_nodes, elastic.model_dump()
    if not low <= resources.nodes <= high:
        fix = f"resources.nodes is {resources.nodes}, which must be between min_nodes and max_nodes"
        yield invalid_value("elastic", value, fix)
        return
    if global_batch_size is None or resources.processes_per_node is None:
        fix = (
            "every number of nodes must divide the global batch equally, and it is not known before the job starts; "
            "set batch_size and a number of gpus"
        )
        yield invalid_value("elastic", value, fix)
        return
    allowed = node_counts(resources, elastic, global_batch_size)
    for name, nodes in (("elastic.min_nodes", low), ("elastic.max_nodes", high)):
        if nodes not in allowed:
            fix = (
                f"{nodes} x {resources.processes_per_node} processes do not divide the global batch of "
                f"{global_batch_size} sequences equally; use one of {', '.join(map(str, sorted(allowed)))}, or change "
                "batch_size"
            )
            yield invalid_value(name, nodes, fix)


def one_process_faults(resources: Resources) -> Iterator[ErrorDetail]:
    """The `faults` of a job that runs as one process, and one detail for every field that requests several."""
    yield from faults(resources)
    for name in ("nodes", "processes"):
        if (value := getattr(resources, name)) not in (None, 1):
            yield invalid_value(f"resources.{name}", value, "the job runs as one process; omit it")


def faults(resources: Resources) -> Iterator[ErrorDetail]:
    """One detail for every field that contradicts another."""
    if resources.nodes > 1 and resources.gpus == "all":
        fix = "every node needs the same number of GPUs; use a number, such as 8"
        yield invalid_value("resources.gpus", resources.gpus, fix)
    if resources.processes is not None and resources.gpus and resources.processes != resources.gpus:
        fix = f"gpus is {resources.gpus!r}, and each GPU gets exactly one process; omit processes"
        yield invalid_value("resources.processes", resources.processes, fix)
    for name in ("gpu_model", "min_gpu_memory"):
        if resources.gpus == 0 and (value := getattr(resources, name)) is not None:
            yield invalid_value(f"resources.{name}", value, "gpus is 0, so no GPU is used; omit one of them")
