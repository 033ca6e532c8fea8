"""What a benchmark answers: figures of each contestant, one ratio, and the bar that it is held against."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

OURS = "zeta"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy")
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Answer:
    """One line of the table. ``figures`` maps a contestant to its rounds, in ``unit``; ``ratio`` is ours by the peer's.

    ``bar`` is what the ratio is held against: at most so much, or at least. ``notes`` say what was measured how.
    """

    question: str
    unit: str
    figures: Mapping[str, Sequence[float]]
    ratio: float
    bar: float
    better: Literal["at most", "at least"]
    notes: str = ""
    more: Mapping[str, object] = field(default_factory=dict[str, object])

    @property
    def met(self) -> bool:
        return self.ratio <= self.bar if self.better == "at most" else self.ratio >= self.bar


def ratio_of_rounds(ours: Sequence[float], peers: Sequence[float]) -> float:
    """The median of the ratios of rounds, or of single turns: neighbours in time saw the same machine."""
    return statistics.median(a / b for a, b in zip(ours, peers, strict=True))


def machine() -> dict[str, object]:
    """The machine in general terms, the versions, and how busy it was."""
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


def table(answers: Sequence[Answer]) -> str:
    """Markdown, ready to paste: median (least to most) of each contestant's rounds."""
    lines = ["| question | figures, median (least – most) | ratio | bar | |", "|---|---|---|---|---|"]
    for answer in answers:
        figures = "; ".join(
            f"{name} {_short(statistics.median(values))} ({_short(min(values))} – {_short(max(values))})"
            for name, values in answer.figures.items()
        )
        bar = f"{'≤' if answer.better == 'at most' else '≥'} {answer.bar:g}"
        met = "met" if answer.met else "**not met**"
        lines.append(f"| {answer.question} | {answer.unit}: {figures} | {answer.ratio:.3g} | {bar} | {met} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write(answers: Sequence[Answer], about: Mapping[str, object]) -> Path:
    """Everything that was measured, as JSON."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    content = {"machine": dict(about), "answers": [{**asdict(answer), "met": answer.met} for answer in answers]}
    file.write_text(json.dumps(content, indent=1))
    return file
