"""Time until the dashboard has painted 10,000 jobs and a curve of a million points, and until a zoom is drawn.

A real Chromium measures with its own clock, from the start of the navigation or the input to the drawn values. The
first visit of a job after a start of the server also reads the points from the database.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.result import BenchmarkResult
from benchmarks.services import zeta_server
from benchmarks.workload import Size
from tests.harness.browser import Visitor, running_browser, visiting
from tests.server.rows import Rows
from tests.server.server_process import API_KEY

NUM_JOBS, NUM_POINTS, STEPS_PER_EVENT = 10_000, 1_000_000, 1000
VISITS = 5
PAINT_SECONDS, ZOOM_SECONDS = 1.0, 0.2

# Functions, because the pages' Content-Security-Policy does not allow evaluating an expression repeatedly.
_PAINTED = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
_DRAWN = """() => {
  const summary = document.querySelector("#figure-loss .summary")?.textContent;
  return summary?.includes("at step") ? performance.now() : null;
}"""
_ZOOM = """async ([first, last]) => {
  const summary = document.querySelector("#figure-loss .summary");
  const form = document.getElementById("chart-options");
  const before = summary.textContent;
  const started = performance.now();
  form.elements.first.value = first;
  form.elements.last.value = last;
  form.elements.last.dispatchEvent(new Event("change", { bubbles: true }));
  while (summary.textContent === before) await new Promise(requestAnimationFrame);
  return performance.now() - started;
}"""


def measure(size: Size) -> BenchmarkResult:
    num_jobs, num_points = size.of(NUM_JOBS, 100), size.of(NUM_POINTS, 10_000)
    visits = size.of(VISITS, 2)
    with tempfile.TemporaryDirectory() as folder, zeta_server(Path(folder), None) as server:
        rows = Rows(server.settings)
        rows.many_jobs(num_jobs)
        job_id = rows.job()
        rows.attempt(job_id, progress=long_run(num_points))
        with running_browser() as browser, visiting(browser, server.url) as visitor:
            visitor.log_in(API_KEY)
            first_visit = curve_seconds(visitor, job_id)
            figures = {
                "list": [list_seconds(visitor) for _ in range(visits)],
                "curve": [curve_seconds(visitor, job_id) for _ in range(visits)],
                "zoom": [zoom_seconds(visitor, num_points, number) for number in range(visits)],
            }
    medians = {name: statistics.median(seconds) for name, seconds in figures.items()}
    worst = max(medians["list"] / PAINT_SECONDS, medians["curve"] / PAINT_SECONDS, medians["zoom"] / ZOOM_SECONDS)
    return BenchmarkResult(
        title=f"Painting {num_jobs:,} jobs and {num_points:,} points, and a zoom, relative to 1 s and 0.2 s",
        unit="s",
        figures=figures,
        ratio=worst,
        target=1.0,
        target_is="maximum",
        notes=f"SQLite, Chromium; medians of {visits} visits. The first visit of the curve: {first_visit:.2f} s.",
        details={"first_visit_seconds": first_visit},
    )


def long_run(num_points: int) -> list[dict[str, Any]]:
    """The progress of a run that reports many steps in each event."""
    events: list[dict[str, Any]] = []
    for last in range(STEPS_PER_EVENT, num_points + 1, STEPS_PER_EVENT):
        numbers = range(last - STEPS_PER_EVENT + 1, last + 1)
        steps = [{"step": step, "loss": 2 + 5 / step + step % 7 / 100} for step in numbers]
        events.append({"phase": "training", "step": last, "total_steps": num_points, "loss": 2.0, "steps": steps})
    return events


def list_seconds(visitor: Visitor) -> float:
    """From the start of the navigation until the list is painted."""
    visitor.open("/")
    milliseconds: float = visitor.page.wait_for_function(_PAINTED).json_value()
    return milliseconds / 1000


def curve_seconds(visitor: Visitor, job_id: str) -> float:
    """From the start of the navigation until the curves are drawn."""
    visitor.open(f"/jobs/{job_id}")
    milliseconds: float = visitor.page.wait_for_function(_DRAWN, timeout=120_000).json_value()
    return milliseconds / 1000


def zoom_seconds(visitor: Visitor, num_points: int, number: int) -> float:
    """From the input of a range until its points are drawn."""
    first = num_points // 10 + number * num_points // 100
    milliseconds: float = visitor.page.evaluate(_ZOOM, [first, first + num_points // 20])
    return milliseconds / 1000
