"""Comparing jobs in the dashboard: curves, settings that differ, and held-out losses with their noise floor."""

import random
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.harness.browser import Visitor
from tests.harness.page_inspector import PageInspector
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, ServerProcess
from tests.server.web.conftest import Jobs, curve
from zeta_core.contract.job.comparison import DOCUMENT_LOSSES_FILE, DocumentLosses
from zeta_core.contract.job.status import JobStatus

Visit = Callable[..., Visitor]


def evaluated_job(rows: Rows, *, shift: float, seed: int) -> str:
    """A job whose losses on 40 held-out documents are shifted, with noise."""
    noise = random.Random(seed)
    losses = [100 * (2 + shift + noise.gauss(0, 0.05)) for _ in range(40)]
    documents = [f"document {number}" for number in range(40)]
    stored = DocumentLosses(step=9, num_held_out=40, documents=documents, num_targets=[100] * 40, losses=losses)
    job_id = rows.job()
    rows.attempt(job_id, progress=curve(1, 9), to=JobStatus.SUCCEEDED)
    file = {f"training_state/{DOCUMENT_LOSSES_FILE}": ("state", stored.model_dump_json().encode())}
    rows.checkpoint(job_id, "final", 9, file)  # pyright: ignore[reportArgumentType] - the role is a literal
    return job_id


def test_jobs_are_selected_and_compared(visit: Visit, jobs: Jobs) -> None:
    page = visit().page
    for name in ("alpha", "beta"):
        page.get_by_label(f"Compare {name}", exact=True).check()
    page.get_by_role("button", name="Compare the selected jobs").click()
    expect(page.locator("h1")).to_have_text("Compare 2 jobs")
    expect(page.locator("#figure-loss-0 .summary")).to_contain_text("beta fell from 6 at step 1")
    expect(page.locator("#figure-loss-0 .summary")).to_contain_text("alpha fell from 6 at step 1")
    expect(page.locator("#figure-loss-0 canvas")).to_be_visible()


def test_the_comparison_lists_the_settings_that_differ(visit: Visit, rows: Rows, jobs: Jobs) -> None:
    other = rows.job(spec={"learning_rate": 0.01, "entity_name": "other"})
    visitor = visit()
    visitor.open(f"/compare?job={jobs.queued}&job={other}")
    names = visitor.page.locator("section tbody th")
    expect(names).to_have_text(["learning_rate"])
    expect(visitor.page.locator("section tbody td")).to_have_text(["0.0003", "0.01"])


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_a_difference_within_the_noise_is_not_distinguishable(
    visit: Visit, rows: Rows, jobs: Jobs, inspector: PageInspector, color_scheme: str
) -> None:
    first, equal, better = (evaluated_job(rows, shift=shift, seed=seed) for seed, shift in enumerate((0, 0, -0.5)))
    visitor = visit(color_scheme=color_scheme, bypass_csp=True)
    visitor.open(f"/compare?job={first}&job={equal}&job={better}&job={jobs.queued}")
    lines = visitor.page.locator("#evaluation section p")
    expect(lines).to_have_count(3)
    expect(lines.nth(0)).to_contain_text("is not distinguishable")
    expect(lines.nth(1)).to_contain_text("is better")
    expect(lines.nth(1)).to_contain_text("paired bootstrap over 40 held-out documents")
    expect(lines.nth(2)).to_contain_text("delta has no losses of single documents")
    expect(visitor.page.locator("#figure-loss-0 canvas")).to_be_visible()
    inspector.inspect(visitor, f"{color_scheme}:compared evaluations")


def test_a_comparison_needs_two_jobs(server: ServerProcess, jobs: Jobs) -> None:
    with server.http(None) as browser:
        browser.post("/login", data={"key": API_KEY})
        for query in ("", f"?job={jobs.queued}", f"?job={jobs.queued}&job={jobs.queued}"):
            response = browser.get(f"/compare{query}")
            assert (response.status_code, "at least two jobs" in response.text) == (422, True)
