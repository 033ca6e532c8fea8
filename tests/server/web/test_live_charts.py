"""The charts of a running job in a real browser: live points, each once, restarts, zoom, and lost connections."""

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.harness.browser import Visitor
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import ServerProcess
from tests.server.web.conftest import curve
from zeta_core.contract.job.status import JobStatus, StatusReason

Visit = Callable[..., Visitor]


def shown_table(page: Page) -> dict[int, str]:
    """The steps and losses in the table of the loss chart."""
    page.locator("#figure-loss tbody tr").first.wait_for()
    rows = page.locator("#figure-loss tbody tr").all()
    return {int(row.locator("th").inner_text().replace(",", "")): row.locator("td").first.inner_text() for row in rows}


def summary(page: Page) -> str:
    return page.locator("#figure-loss .summary").inner_text()


@pytest.fixture
def job_id(rows: Rows) -> str:
    job_id = rows.job()
    rows.attempt(job_id, progress=curve(1, 5))
    return job_id


def add_steps(rows: Rows, job_id: str, first: int, last: int) -> None:
    rows.progress(job_id, curve(first, last))


def test_the_curve_grows_with_the_run(visit: Visit, rows: Rows, job_id: str) -> None:
    page = visit().page
    page.goto(page.url + f"jobs/{job_id}")
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 5")
    page.locator("#figure-loss summary").click()
    add_steps(rows, job_id, 6, 9)
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 9", timeout=20_000)
    expect(page.locator("[data-value=step]")).to_have_text("9")
    assert list(shown_table(page)) == list(range(1, 10))


@pytest.mark.extended
def test_a_restart_of_the_server_neither_loses_nor_doubles_a_point(
    visit: Visit, rows: Rows, job_id: str, server: ServerProcess, http: httpx.Client
) -> None:
    visitor = visit()
    page = visitor.page
    page.goto(page.url + f"jobs/{job_id}")
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 5")
    page.locator("#figure-loss summary").click()
    server.end()
    expect(page.locator("#connection")).to_be_visible(timeout=20_000)
    add_steps(rows, job_id, 6, 8)
    server.start()
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 8", timeout=40_000)
    expect(page.locator("#connection")).to_be_hidden()
    add_steps(rows, job_id, 9, 11)
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 11", timeout=20_000)
    metrics = http.get(f"/v1/jobs/{job_id}/metrics").json()
    assert list(shown_table(page)) == metrics["step"]
    visitor.faults.clear()  # of the requests while there was no server


@pytest.mark.extended
def test_a_new_attempt_replaces_the_discarded_steps(visit: Visit, rows: Rows, job_id: str) -> None:
    page = visit().page
    page.goto(page.url + f"jobs/{job_id}")
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 5")
    rows.requeue(job_id, StatusReason.PROCESS_KILLED)
    rows.attempt(job_id, progress=curve(4, 7))
    expect(page.locator("#figure-loss .summary")).to_contain_text("Attempt 2 continued at step 4.", timeout=20_000)
    page.locator("#figure-loss summary").click()
    assert list(shown_table(page)) == list(range(1, 8))


def test_zoom_and_axes_are_controlled_by_the_keyboard(visit: Visit, rows: Rows, job_id: str) -> None:
    add_steps(rows, job_id, 6, 40)
    page = visit().page
    page.goto(page.url + f"jobs/{job_id}")
    page.locator("input[name=first]").fill("10")
    page.locator("input[name=last]").fill("20")
    page.keyboard.press("Enter")
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 20;")
    assert "from 1.5 at step 10 to 1.25 at step 20;" in summary(page)
    page.get_by_role("button", name="Show all").press("Enter")
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 1 to")
    page.locator("input[name=x][value=step]").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#figure-loss .summary")).to_contain_text("at 512 tokens")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#figure-loss .summary")).to_contain_text("at 0 s")
    page.locator("input[name=log]").press("Space")
    expect(page.locator("#figure-loss canvas")).to_be_visible()


def test_dragging_on_a_chart_zooms_every_chart(visit: Visit, rows: Rows, job_id: str) -> None:
    add_steps(rows, job_id, 6, 40)
    page = visit().page
    page.goto(page.url + f"jobs/{job_id}")
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 40")
    box: Any = page.locator("#figure-loss .u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60, steps=5)
    page.mouse.up()
    expect(page.get_by_role("button", name="Show all")).to_be_enabled()
    first, last = (int(page.input_value(f"input[name={name}]")) for name in ("first", "last"))
    assert 9 <= first < last <= 22
    page.locator("#figure-grad_norm").dblclick()
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 40")


@pytest.mark.extended
def test_the_smoothed_line_of_a_long_run_shows_its_mean(visit: Visit, rows: Rows) -> None:
    job_id = rows.job()
    rows.attempt(job_id, progress=alternating(1, 5994))
    page = visit().page
    page.goto(page.url + f"jobs/{job_id}")
    legend = page.locator("#figure-loss .legend")
    expect(legend).to_have_text("Training loss (smoothed) 2")
    rows.progress(job_id, alternating(5995, 5997))
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 5,997", timeout=20_000)
    expect(legend).to_have_text(re.compile(r"Training loss \(smoothed\) (1\.[6-9]|2)\d*"))


def alternating(first: int, last: int) -> list[dict[str, Any]]:
    """Losses: every third one is 4, and the others are 1. Their mean is 2, and that of the extremes is 2.5."""
    losses = ((step, 4.0 if step % 3 == 0 else 1.0) for step in range(first, last + 1))
    return [{"phase": "training", "step": step, "loss": loss} for step, loss in losses]


@pytest.mark.extended
def test_a_job_that_ends_shows_its_result_without_reloading(visit: Visit, rows: Rows, job_id: str) -> None:
    page = visit().page
    page.goto(page.url + f"jobs/{job_id}")
    expect(page.locator("h1 .status")).to_have_text("running")
    rows.end(job_id, JobStatus.CANCELLED)
    expect(page.locator("h1 .status")).to_have_text("cancelled", timeout=20_000)
    expect(page.get_by_role("button", name="Delete")).to_be_visible()


def test_a_hidden_page_holds_no_connection(visit: Visit, server: ServerProcess, rows: Rows, job_id: str) -> None:
    page = visit().page
    page.goto(page.url + f"jobs/{job_id}")
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 5")
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    page.evaluate(hide % "true" + "document.dispatchEvent(new Event('visibilitychange'))")
    add_steps(rows, job_id, 6, 7)
    page.wait_for_timeout(500)
    assert "at step 5" in summary(page)
    page.evaluate(hide % "false" + "document.dispatchEvent(new Event('visibilitychange'))")
    wait_until(lambda: "at step 7" in summary(page), 10, "the missed steps")


def test_a_point_of_many_steps_counts_as_many_in_the_smoothed_line(visit: Visit, rows: Rows) -> None:
    losses = {**dict.fromkeys(range(1, 101), 5.0), 200: 2.0}  # step 200: the mean over 100 steps
    progress = [{"phase": "training", "step": step, "loss": loss} for step, loss in losses.items()]
    job_id = rows.job()
    rows.attempt(job_id, progress=progress)
    page = visit().page
    page.goto(page.url + f"jobs/{job_id}")
    expect(page.locator("#figure-loss .legend")).to_have_text("Training loss (smoothed) 2")
