"""The result of a benchmark: the figures of each contestant, and one ratio that is compared with a target."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

ZETA = "zeta"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy")
RESULTS_DIRECTORY = Path(__file__).resolve().parent / "results"


class Skipped(Exception):
    """The benchmark cannot run here; the message is the reason."""


@dataclass(frozen=True)
class BenchmarkResult:
    """One row of the table. ``figures`` contains the figure of each round by contestant, in ``unit``.

    ``ratio`` is this project's figure divided by that of the library it is compared with (for speed, higher is better).
    ``target`` is the maximum or minimum of the ratio. ``notes`` describe the workload and the method.
    """

    title: str
    unit: str
    figures: Mapping[str, Sequence[float]]
    ratio: float
    target: float
    target_is: Literal["maximum", "minimum"]
    notes: str = ""
    details: Mapping[str, object] = field(default_factory=dict[str, object])

    @property
    def meets_target(self) -> bool:
        return self.ratio <= self.target if self.target_is == "maximum" else self.ratio >= self.target

    def as_json(self) -> dict[str, object]:
        """The keys do not change, so that scripts can compare the files of different versions."""
        return {
            "question": self.title,
            "unit": self.unit,
            "figures": self.figures,
            "ratio": self.ratio,
            "bar": self.target,
            "better": "at most" if self.target_is == "maximum" else "at least",
            "notes": self.notes,
            "more": self.details,
            "met": self.meets_target,
        }


def ratio_of_rounds(figures: Sequence[float], reference_figures: Sequence[float]) -> float:
    """The median of the ratios of rounds, or of single steps: measurements close in time had the same machine load."""
    return statistics.median(a / b for a, b in zip(figures, reference_figures, strict=True))


def describe_machine() -> dict[str, object]:
    """The machine in general terms, the versions of packages, and the current load."""
    import torch

    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages * size / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "load_average_1_5_15_minutes": [round(load, 1) for load in os.getloadavg()],
    }


def markdown_table(results: Sequence[BenchmarkResult]) -> str:
    """A Markdown table with the median (minimum and maximum) of each contestant's rounds."""
    lines = [
        "| benchmark | figures, median (minimum – maximum) | ratio | target | |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        figures = "; ".join(
            f"{name} {_short(statistics.median(values))} ({_short(min(values))} – {_short(max(values))})"
            for name, values in result.figures.items()
        )
        target = f"{'≤' if result.target_is == 'maximum' else '≥'} {result.target:g}"
        met = "met" if result.meets_target else "**not met**"
        lines.append(f"| {result.title} | {result.unit}: {figures} | {result.ratio:.3g} | {target} | {met} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_json(
    results: Sequence[BenchmarkResult], environment: Mapping[str, object], skipped: Mapping[str, str]
) -> Path:
    """Write all measurements to a new file, and return its path. ``skipped`` contains reasons by name."""
    RESULTS_DIRECTORY.mkdir(exist_ok=True)
    file = RESULTS_DIRECTORY / f"{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    content = {
        "machine": dict(environment),
        "answers": [result.as_json() for result in results],
        "skipped": dict(skipped),
    }
    file.write_text(json.dumps(content, indent=1))
    return file
