"""The pages of sweeps in a real browser: creating one, its results, comparing, and cancelling."""

import re
from collections.abc import Callable

import httpx
import pytest
from playwright.sync_api import expect

from server.web.spec_yaml import write_yaml
from tests.harness.browser import Visitor
from tests.harness.page_inspector import PageInspector
from tests.server.rows import Rows
from tests.server.server_process import SPEC
from tests.server.web.conftest import curve
from zeta_core.contract.job.status import JobStatus, StatusReason

Visit = Callable[..., Visitor]


@pytest.fixture
def sweep_id(http: httpx.Client) -> str:
    body = {"spec": SPEC, "grid": {"seed": [1, 2, 3]}}
    return http.post("/v1/sweeps", json=body).raise_for_status().json()["id"]


def finish(rows: Rows, job_id: str, *, eval_loss: float) -> None:
    rows.attempt(job_id, progress=curve(1, 20), to=JobStatus.SUCCEEDED)
    rows.change(job_id, progress=curve(20, 20)[0], result={"train_loss": 2.0, "eval_loss": eval_loss})


def test_a_sweep_is_created_from_the_form_and_cancelled(visit: Visit, http: httpx.Client) -> None:
    page = visit().page
    page.get_by_role("link", name="Sweeps").click()
    page.get_by_role("link", name="New sweep").click()
    page.fill("#grid", "learning_rate: [1e-4, 3e-4]\nseed: [1, 2]\n")
    page.fill("#yaml", write_yaml(SPEC))
    page.get_by_role("button", name="Submit the sweep").click()
    rows = page.locator("#sweep tbody tr")
    expect(rows).to_have_count(4)
    sweep = http.get(f"/v1/sweeps/{page.url.rpartition('/')[2]}").json()
    assert [job["settings"]["learning_rate"] for job in sweep["jobs"]] == [1e-4, 1e-4, 3e-4, 3e-4]
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Cancel all").click()
    expect(rows.locator(".status.cancelled")).to_have_count(4)
    expect(page.get_by_role("button", name="Cancel all")).to_have_count(0)


def test_the_form_for_a_new_job_becomes_the_spec_of_a_sweep(visit: Visit) -> None:
    visitor = visit()
    visitor.open("/new")
    visitor.page.fill("#model_hub", "owner/name")
    visitor.page.get_by_role("button", name="Vary settings in a sweep").click()
    expect(visitor.page.locator("#yaml")).to_have_value(re.compile("model: owner/name"))


def test_faults_of_a_sweep_are_shown_in_its_form(visit: Visit) -> None:
    visitor = visit()
    visitor.open("/sweeps/new")
    visitor.page.fill("#grid", "learning_rate: [0.001]\nseed: []\n")
    visitor.page.fill("#yaml", write_yaml(SPEC))
    visitor.page.get_by_role("button", name="Submit the sweep").click()
    expect(visitor.page.get_by_role("alert").last).to_contain_text("grid.seed has no values")
    expect(visitor.page.locator("#grid")).to_have_value("learning_rate: [0.001]\nseed: []\n")
    visitor.faults = [fault for fault in visitor.faults if "422" not in fault]


@pytest.mark.extended
def test_the_best_job_is_first_and_the_jobs_are_compared(
    visit: Visit, http: httpx.Client, rows: Rows, sweep_id: str
) -> None:
    jobs = [job["id"] for job in http.get(f"/v1/sweeps/{sweep_id}").json()["jobs"]]
    finish(rows, jobs[0], eval_loss=2.5)
    finish(rows, jobs[2], eval_loss=1.5)
    visitor = visit()
    visitor.open(f"/sweeps/{sweep_id}")
    expect(visitor.page.locator("#sweep tbody th a")).to_have_text([jobs[2], jobs[0], jobs[1]])
    expect(visitor.page.locator(f"#row-{jobs[2]}")).to_contain_text("best")
    finish(rows, jobs[1], eval_loss=1.0)
    expect(visitor.page.locator(f"#row-{jobs[1]}")).to_contain_text("best", timeout=20_000)
    visitor.page.get_by_role("link", name="Compare the jobs").click()
    expect(visitor.page.get_by_role("heading", name="Compare 3 jobs")).to_be_visible()
    visitor.open(f"/jobs/{jobs[0]}")
    visitor.page.get_by_role("link", name="sweep", exact=True).click()
    expect(visitor.page).to_have_url(f"{visitor.url}/sweeps/{sweep_id}")


def test_a_sweep_with_halving_shows_its_next_comparison_and_the_eliminated_jobs(
    visit: Visit, http: httpx.Client, rows: Rows
) -> None:
    body = {"spec": SPEC, "grid": {"seed": [1, 2, 3, 4]}, "halving": {"steps": 2}}
    sweep = http.post("/v1/sweeps", json=body).raise_for_status().json()
    visitor = visit()
    visitor.open(f"/sweeps/{sweep['id']}")
    expect(visitor.page.locator("#sweep")).to_contain_text("The jobs are compared at step 2. The better half continues")
    out, waiting = sweep["jobs"][0]["id"], sweep["jobs"][1]["id"]
    rows.change(out, status=JobStatus.CANCELLED, status_reason=StatusReason.ELIMINATED)
    rows.change(waiting, status=JobStatus.PAUSED, status_reason=StatusReason.WAITS_FOR_SWEEP)
    visitor.page.reload()
    expect(visitor.page.locator(f"#row-{out}")).to_contain_text("cancelled eliminated")
    expect(visitor.page.locator(f"#row-{waiting}")).to_contain_text("paused until the comparison")


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_the_page_of_a_sweep_is_accessible_and_fits_a_phone(
    visit: Visit, inspector: PageInspector, sweep_id: str, color_scheme: str
) -> None:
    visitor = visit(color_scheme=color_scheme, bypass_csp=True, viewport={"width": 360, "height": 740})
    for path in ("/sweeps", f"/sweeps/{sweep_id}"):
        visitor.open(path)
        inspector.inspect(visitor, f"{color_scheme}:{path.replace(sweep_id, 'sweep')}")
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 360, path
