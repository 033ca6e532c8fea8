"""The points of charts: those of the training curves, reduced without losing extremes, updated, and by axis."""

import math
import time
from array import array
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from server.jobs.chart_points import ChartQuery, JobPoints, reduce_curve, reduced_curves
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, ServerProcess
from zeta_core.contract.job.status import JobStatus, StatusReason

START = datetime(2026, 11, 30, tzinfo=UTC)


@pytest.fixture
def browser(server: ServerProcess) -> httpx.Client:
    client = server.http(None)
    client.post("/login", data={"key": API_KEY})
    return client


def training(step: int, **fields: Any) -> dict[str, Any]:
    return {"phase": "training", "step": step, "loss": 5 / step, "tokens": step * 100, **fields}


def points(browser: httpx.Client, job_id: str, **query: Any) -> dict[str, Any]:
    return browser.get(f"/jobs/{job_id}/curves", params=query).raise_for_status().json()


def assert_same_as_metrics(browser: httpx.Client, http: httpx.Client, job_id: str) -> None:
    """The unreduced points are those of ``GET /v1/jobs/{id}/metrics``."""
    metrics = http.get(f"/v1/jobs/{job_id}/metrics").json()
    curves = points(browser, job_id)["curves"]
    for name, values in metrics.items():
        if name not in ("object", "step"):
            known = [(step, value) for step, value in zip(metrics["step"], values, strict=True) if value is not None]
            curve = curves.get(name, {"x": [], "y": []})
            assert list(zip(curve["x"], curve["y"], strict=True)) == known, name


def test_the_points_are_those_of_the_training_curves(rows: Rows, http: httpx.Client, browser: httpx.Client) -> None:
    job_id = rows.job()
    singles = [{"step": step, "loss": 1.0 + step, "tokens": step * 100} for step in (4, 5, 6)]
    first = [training(1), training(2), training(3, eval_loss=2.5), training(6, steps=singles), training(9)]
    rows.attempt(job_id, progress=first, to=JobStatus.QUEUED, reason=StatusReason.PROCESS_KILLED)
    assert_same_as_metrics(browser, http, job_id)
    rows.attempt(job_id, progress=[training(5, loss=0.5), training(6, eval_loss=0.7, perplexity=math.exp(0.7))])
    assert_same_as_metrics(browser, http, job_id)
    answer = points(browser, job_id)
    assert answer["restarts"] == [{"attempt": 2, "step": 5, "x": 5, "reason": "process_killed"}]
    assert answer["last_seq"] == http.get(f"/v1/jobs/{job_id}/events?limit=1000").json()["data"][-1]["seq"]


def test_a_curve_without_values_is_empty(rows: Rows, browser: httpx.Client) -> None:
    answer = points(browser, rows.job())
    assert (answer["curves"], answer["restarts"], answer["last_step"]) == ({}, [], None)


def test_a_range_is_selected_on_every_axis(rows: Rows, browser: httpx.Client) -> None:
    job_id = rows.job()
    rows.attempt(job_id, progress=[training(step) for step in range(1, 21)])
    assert points(browser, job_id, first=5, last=7)["curves"]["loss"]["x"] == [5, 6, 7]
    assert points(browser, job_id, x="tokens", first=500, last=700)["curves"]["loss"]["x"] == [500, 600, 700]
    seconds = points(browser, job_id, x="seconds")["curves"]["loss"]["x"]
    assert seconds == sorted(seconds)
    assert len(seconds) == 20
    assert points(browser, job_id, first=100)["curves"]["loss"] == {"x": [], "y": []}
    by_tokens = points(browser, job_id, x="tokens", first=500, last=700)["curves"]["loss"]
    assert by_tokens["steps"] == [5, 6, 7]


def test_other_projects_and_unknown_parameters_are_refused(rows: Rows, browser: httpx.Client) -> None:
    assert browser.get(f"/jobs/{rows.job(project='other')}/curves").status_code == 404
    assert browser.get(f"/jobs/{rows.job()}/curves?x=weeks").status_code == 422
    assert browser.get(f"/jobs/{rows.job()}/curves?smooth=1").status_code == 422


@pytest.mark.parametrize("max_points", [10, 100, 2000])
def test_a_reduced_curve_keeps_its_ends_and_every_extreme(max_points: int) -> None:
    values = array("d", (math.sin(step / 500) for step in range(100_000)))
    values[31_234], values[77_777] = 9.0, -9.0
    chosen = list(reduce_curve(values, 0, len(values), max_points))
    assert len(chosen) <= max_points
    assert chosen == sorted(set(chosen))
    assert {0, 31_234, 77_777, 99_999} <= set(chosen)


def test_a_short_curve_is_not_reduced() -> None:
    assert list(reduce_curve(array("d", range(50)), 10, 20, 10)) == list(range(10, 20))


def test_a_reduced_curve_has_the_mean_of_each_part() -> None:
    job = JobPoints()
    for step in range(1, 6001):
        job.add(1, START + timedelta(seconds=step), {"step": step, "loss": 4.0 if step % 3 == 0 else 1.0})
    loss = reduced_curves(job, ChartQuery(names=("loss",), max_points=402))["loss"]
    assert set(loss["y"]) == {1.0, 4.0}
    assert loss["means"] == {"x": [16 + 30 * part for part in range(200)], "y": [2.0] * 200}
    assert "means" not in reduced_curves(job, ChartQuery(names=("loss",), last=400, max_points=402))["loss"]


@pytest.mark.slow
def test_a_curve_of_a_million_points_is_reduced_in_a_fraction_of_a_second() -> None:
    job = JobPoints()
    for step in range(1, 1_000_001):
        job.add(1, START + timedelta(seconds=step), {"step": step, "loss": 1 / step, "tokens": step})
    started = time.perf_counter()
    reduced = reduced_curves(job, ChartQuery(names=("loss",), first=1000, last=900_000))
    assert time.perf_counter() - started < 0.8  # 0.1 s on an idle machine
    assert len(reduced["loss"]["x"]) <= 2000
