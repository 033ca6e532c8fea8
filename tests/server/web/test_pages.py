"""Every page in a real browser: accessible in light and dark, on narrow screens, and without a foreign request."""

import re
from collections.abc import Callable
from contextlib import suppress

import httpx
import pytest
from playwright.sync_api import Error, Route, expect

from tests.harness.browser import Visitor
from tests.harness.page_inspector import PageInspector, save_picture
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, ServerProcess
from tests.server.web.conftest import Jobs, curve
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.status import JobStatus

Visit = Callable[..., Visitor]


def paths(jobs: Jobs) -> list[str]:
    """One address of every page."""
    tabs = ("", "/log", "/events", "/checkpoints", "/samples", "/chat", "/data", "/settings")
    others = ["/new", f"/new?edit={jobs.queued}", "/files", "/workers", "/keys", "/projects", "/audit"]
    others += [
        "/webhooks",
        f"/webhooks/{jobs.webhook}",
        f"/files/{jobs.file}/rows",
        "/limits",
        "/sweeps",
        "/sweeps/new",
        f"/sweeps/new?job={jobs.succeeded}",
    ]
    others.append(f"/compare?job={jobs.running}&job={jobs.succeeded}")
    of_jobs = [f"/jobs/{job_id}{tab}" for job_id in (jobs.running, jobs.succeeded) for tab in tabs]
    return [
        "/",
        "/?q=nothing",
        "/?show=failed",
        "/?sort=loss",
        f"/jobs/{jobs.failed}",
        f"/jobs/{jobs.queued}",
        *of_jobs,
        *others,
        "/jobs/none",
    ]


def named(path: str, jobs: Jobs) -> str:
    """The address with the states of the jobs instead of their ids."""
    for state, job_id in (("running", jobs.running), ("succeeded", jobs.succeeded), ("failed", jobs.failed)):
        path = path.replace(job_id, state)
    return path.replace(jobs.queued, "queued")


@pytest.mark.extended
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_no_page_has_a_serious_finding_of_axe(
    visit: Visit, jobs: Jobs, inspector: PageInspector, color_scheme: str
) -> None:
    visitor = visit(color_scheme=color_scheme, bypass_csp=True)
    for path in paths(jobs):
        visitor.open(path)
        visitor.page.wait_for_load_state("networkidle" if path == "/" else "load")
        inspector.inspect(visitor, f"{color_scheme}:{named(path, jobs)}")
    visitor.page.context.clear_cookies()
    visitor.open("/login")
    inspector.inspect(visitor, f"{color_scheme}:login")
    visitor.faults = [fault for fault in visitor.faults if "404" not in fault]  # of the page that does not exist


@pytest.mark.extended
def test_no_page_scrolls_sideways_on_a_phone(visit: Visit, jobs: Jobs) -> None:
    visitor = visit(viewport={"width": 360, "height": 740})
    for path in paths(jobs)[:-1]:
        visitor.open(path)
        width = visitor.page.evaluate("document.documentElement.scrollWidth")
        save_picture(visitor, f"narrow:{named(path, jobs)}")
        assert width <= 360, path
        assert visitor.page.evaluate("scrollY") == 0, path


def test_every_response_has_the_security_headers(server: ServerProcess, http: httpx.Client, jobs: Jobs) -> None:
    with server.http(None) as browser:
        browser.post("/login", data={"key": API_KEY})
        for path in (*paths(jobs), "/login", "/assets/none/x.js"):
            response = browser.get(path)
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy, path
            assert "unsafe" not in policy
            assert response.headers["x-content-type-options"] == "nosniff"
            assert not re.search(r"<script(?![^>]* src=)|\sstyle=|\son\w+=", response.text), path
            if path.startswith("/jobs"):
                assert response.headers["cache-control"] == "no-store"


def test_pages_answer_head_and_errors_keep_the_navigation(server: ServerProcess) -> None:
    with server.http(None) as browser:
        browser.post("/login", data={"key": API_KEY})
        assert (browser.head("/").status_code, browser.head("/").content) == (200, b"")
        assert 'aria-label="Pages"' in browser.get("/jobs/none").text
        for parameter in (
            "order=loss",
            "sort=weight",
            "sort=loss&after=x",
            f"sort=loss&after={new_id('job')}&after_value=x",
        ):
            response = browser.get(f"/?{parameter}")
            assert (response.status_code, "invalid" in response.text) == (422, True), parameter


def test_texts_of_users_are_shown_as_text_and_never_as_html(visit: Visit, rows: Rows, jobs: Jobs) -> None:
    name = "<img src=x onerror=alert(1)>"
    rows.change(jobs.queued, entity_name=name, job_metadata={"<b>": "</script>"})
    visitor = visit()
    expect(visitor.page.locator(f"#row-{jobs.queued} .name")).to_have_text(name)
    visitor.open(f"/jobs/{jobs.queued}")
    expect(visitor.page.locator("h1")).to_contain_text(name)
    rows.change(jobs.queued, entity_name="delta")


def test_the_list_of_jobs_is_filtered_and_searched(visit: Visit, jobs: Jobs) -> None:
    visitor = visit()
    names = visitor.page.locator(".jobs .name")
    expect(names).to_have_count(4)
    visitor.page.keyboard.press("/")
    visitor.page.keyboard.type("GAMM")
    expect(names).to_have_text(["gamma"])
    expect(visitor.page.locator("#search")).to_be_focused()
    visitor.page.get_by_role("link", name="Succeeded").click()
    expect(visitor.page.get_by_text("No job matches these filters.")).to_be_visible()
    visitor.page.get_by_role("link", name="Show all jobs").click()
    visitor.page.get_by_role("link", name="Succeeded").click()
    expect(names).to_have_text(["beta"])
    names.click()
    expect(visitor.page).to_have_url(f"{visitor.url}/jobs/{jobs.succeeded}")


def test_the_list_is_sorted_by_its_column_headings(visit: Visit, jobs: Jobs) -> None:
    visitor = visit()
    names = visitor.page.locator(".jobs .name")
    for heading, order in (
        ("Loss", ["beta", "alpha", "delta", "gamma"]),
        ("Job", ["alpha", "beta", "delta", "gamma"]),
        ("Job", ["gamma", "delta", "beta", "alpha"]),
        ("Submitted", ["delta", "gamma", "beta", "alpha"]),
        ("Submitted", ["alpha", "beta", "gamma", "delta"]),
        ("Status", ["alpha", "delta", "gamma", "beta"]),
    ):
        visitor.page.get_by_role("link", name=heading, exact=True).click()
        expect(names).to_have_text(order)
    expect(visitor.page.get_by_role("columnheader", name="Status")).to_have_attribute("aria-sort", "ascending")
    visitor.page.fill("#search", "BETA")
    expect(names).to_have_text(["beta"])
    visitor.page.fill("#search", "")
    expect(names).to_have_text(["alpha", "delta", "gamma", "beta"])


def test_a_slow_refresh_of_the_list_does_not_undo_a_search(visit: Visit, jobs: Jobs) -> None:
    visitor = visit()
    page, names = visitor.page, visitor.page.locator(".jobs .name")
    held: list[Route] = []
    page.route("**/jobs/rows", lambda route: held.append(route))
    page.evaluate("document.getElementById('jobs').dispatchEvent(new CustomEvent('refresh'))")
    wait_until(lambda: (page.wait_for_timeout(20), bool(held))[1], 10, "the refresh to begin")
    page.fill("#search", "BETA")
    expect(names).to_have_text(["beta"])
    for route in held:
        with suppress(Error):  # the page has given up this request
            route.continue_()
    page.wait_for_timeout(300)
    expect(names).to_have_text(["beta"])
    page.unroute_all()


def test_jobs_are_chosen_and_opened_by_keyboard(visit: Visit, jobs: Jobs) -> None:
    visitor = visit()
    keyboard = visitor.page.keyboard
    for key in ("/", "ArrowDown", "x", "ArrowDown", "x", "End", "ArrowUp"):
        keyboard.press(key)
    expect(visitor.page.locator(".jobs input:checked")).to_have_count(2)
    expect(visitor.page.locator(f"#row-{jobs.succeeded} .name")).to_be_focused()
    keyboard.press("Enter")
    expect(visitor.page).to_have_url(f"{visitor.url}/jobs/{jobs.succeeded}")


@pytest.mark.extended
def test_the_list_shows_new_jobs_and_changes_without_reloading(visit: Visit, rows: Rows, jobs: Jobs) -> None:
    visitor = visit()
    job_id = rows.job()
    row = visitor.page.locator(f"#row-{job_id}")
    expect(row.locator(".status")).to_have_text("queued", timeout=20_000)
    rows.attempt(job_id, progress=curve(1, 5), to=JobStatus.SUCCEEDED)
    expect(row.locator(".status")).to_have_text("succeeded", timeout=20_000)
    expect(row.locator(".sparkline")).to_be_visible()


def test_the_log_is_searched(visit: Visit, jobs: Jobs) -> None:
    visitor = visit()
    visitor.open(f"/jobs/{jobs.running}/log")
    log = visitor.page.locator("#log-text")
    expect(log).to_contain_text("WARNING three")
    expect(log).to_contain_text("=== attempt 2")
    visitor.page.fill("#log-search", "warning")
    expect(log.locator("mark")).to_have_text(["WARNING"])
    visitor.page.check("text=Only matching lines")
    expect(log).to_have_text("WARNING three\n")


def test_all_sample_texts_are_shown_by_prompt(visit: Visit, rows: Rows, jobs: Jobs) -> None:
    samples = [
        {"step": step, "prompt": prompt, "text": f"answer to {prompt} at {step}"}
        for step in range(1, 121)
        for prompt in ("one", "two")
    ]
    rows.samples(jobs.running, samples)
    page = visit().page
    page.goto(page.url + f"jobs/{jobs.running}")
    expect(page.locator("#sample-list blockquote")).to_have_count(6)
    page.get_by_role("link", name="All sample texts").click()
    expect(page.locator("h2.prompt")).to_have_text(["two", "one"])
    first = page.locator("section", has=page.get_by_role("heading", name="one")).locator("tbody tr")
    expect(first.first).to_have_text(re.compile(r"^120\s*2\s*answer to one at 120$"))
    page.get_by_role("link", name="Earlier samples").click()
    expect(first).to_have_count(20)


def test_the_settings_show_where_each_value_comes_from(visit: Visit, jobs: Jobs) -> None:
    visitor = visit()
    visitor.open(f"/jobs/{jobs.queued}/settings")
    for name, origin in (("max_steps", "given"), ("seed", "default"), ("learning_rate", "default")):
        row = visitor.page.locator("tr", has=visitor.page.locator(f"code:text-is('{name}')"))
        expect(row.locator(".origin")).to_have_text(origin)


def test_a_failed_job_is_rerun_with_the_patch_of_its_error(visit: Visit, jobs: Jobs, http: httpx.Client) -> None:
    visitor = visit()
    visitor.open(f"/jobs/{jobs.failed}")
    expect(visitor.page.get_by_text("Few steps.")).to_have_count(1)
    visitor.page.get_by_role("button", name="Rerun with batch_size=2").click()
    visitor.page.wait_for_url(lambda url: not url.endswith(jobs.failed))
    job = http.get(f"/v1/jobs/{visitor.page.url.rpartition('/')[2]}").json()
    assert (job["parent"], job["spec"]["batch_size"]) == (jobs.failed, 2)


@pytest.mark.extended
def test_ten_thousand_jobs_are_listed_quickly(server: ServerProcess, rows: Rows) -> None:
    rows.many_jobs(10_000)
    with server.http(None) as browser:
        browser.post("/login", data={"key": API_KEY})
        for path in ("/", "/?show=succeeded", "/?q=entity-77", "/?q=nothing", "/?sort=loss", "/?sort=-name"):
            response = min((browser.get(path) for _ in range(3)), key=lambda answer: answer.elapsed)
            assert response.elapsed.total_seconds() < 1, path
            assert len(response.content) < 200_000
        older = re.search(r'rel="next" href="([^"]+)"', browser.get("/").text)
        assert older is not None
        assert browser.get(older.group(1)).status_code == 200
