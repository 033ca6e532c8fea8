"""The usage of a worker's machine as a table: the newest, mean and highest values of each resource, and its curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from zeta.cli.output import size
from zeta.cli.sparkline import LEVELS
from zeta.cli.table import GAP, Column, table_lines
from zeta.cli.wrapping import cell_len
from zeta_core.contract.job.machine_usage import GpuUsageCurves, WorkerUsage

MIN_CURVE = 12  # columns
CURVE_HEAD = "OVER TIME"


@dataclass(frozen=True)
class _Resource:
    """One resource of the machine: its values over time, and the value at the top of its curve."""

    name: str
    device: str | None
    values: Sequence[float | None]
    top: float
    text: Callable[[float], str]

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]

    def cells(self) -> tuple[object, ...]:
        newest = self.values[-1] if self.values else None
        known = self.known
        figures = (newest, sum(known) / len(known), max(known)) if known else (None, None, None)
        return (self.name, self.device, *(None if figure is None else self.text(figure) for figure in figures))


def usage_lines(usage: WorkerUsage, hours: int, width: int) -> list[str]:
    """The table's lines for the last ``hours``. A gap in a curve is a time in which the worker was not connected."""
    resources = _resources(usage)
    columns = (
        Column("RESOURCE", min_width=12),
        Column("DEVICE", min_width=6, drop_order=3),
        Column("NEWEST"),
        Column("MEAN", drop_order=2),
        Column("HIGHEST", drop_order=1),
    )
    head, *lines = table_lines(columns, [each.cells() for each in resources], width - len(GAP) - MIN_CURVE)
    start = max(map(cell_len, (head, *lines))) + len(GAP)
    curves = [_curve(usage, each, hours, width - start) for each in resources]
    shown = [line + " " * (start - cell_len(line)) + curve for line, curve in zip(lines, curves, strict=True)]
    return [line.rstrip() for line in (head + " " * (start - cell_len(head)) + CURVE_HEAD, *shown)]


def _resources(usage: WorkerUsage) -> list[_Resource]:
    found = [
        _Resource("cores", None, usage.cpu, 1.0, _percent),
        _Resource("memory", None, usage.memory_bytes, max(usage.memory_bytes, default=0), _size),
    ]
    for gpu in usage.gpus:
        name = gpu.device if gpu.device.startswith(("GPU-", "MIG-")) else f"GPU {gpu.device}"
        found.append(_Resource(name, gpu.name, gpu.utilization, 1.0, _percent))
        found.append(_Resource(f"{name} memory", gpu.name, gpu.memory_bytes, _highest_memory(gpu), _size))
    return found


def _highest_memory(gpu: GpuUsageCurves) -> int:
    return max((value for value in gpu.memory_bytes if value is not None), default=0)


def _curve(usage: WorkerUsage, resource: _Resource, hours: int, width: int) -> str:
    """Bars from 0 to the top, each for an equal share of the time; a blank where nothing was measured."""
    span = hours * 3600
    count = min(width, span // usage.interval_seconds)
    interval = timedelta(seconds=usage.interval_seconds)
    # The interval that has just begun is not stored yet.
    end = max(datetime.now(UTC) - interval, usage.at[-1] + interval)
    shares: list[list[float]] = [[] for _ in range(count)]
    for at, value in zip(usage.at, resource.values, strict=True):
        offset_seconds = span - (end - at).total_seconds()
        if value is not None and offset_seconds >= 0:
            shares[int(offset_seconds * count / span)].append(value)
    return "".join(_bar(share, resource.top) for share in shares)


def _bar(values: Sequence[float], top: float) -> str:
    if not values:
        return " "
    mean = sum(values) / len(values)
    return LEVELS[min(int(mean / top * len(LEVELS)), len(LEVELS) - 1)] if top > 0 else LEVELS[0]


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def _size(num_bytes: float) -> str:
    return size(round(num_bytes))
