"""States of the dashboard: empty, loading, failing, and without a connection. Each is accessible and has a picture."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Route, expect

from tests.harness.browser import Visitor
from tests.harness.page_inspector import PageInspector
from tests.server.rows import Rows
from tests.server.server_process import ServerProcess
from tests.server.web.conftest import curve

Visit = Callable[..., Visitor]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_state_is_accessible(
    visit: Visit, rows: Rows, server: ServerProcess, inspector: PageInspector, scheme: str, tmp_path: Path
) -> None:
    visitor = visit(color_scheme=scheme, bypass_csp=True)
    page = visitor.page

    def inspect(state: str) -> None:
        inspector.inspect(visitor, f"states-{scheme}:{state}")

    if scheme == "light":  # the server has no jobs yet
        for path in ("", "files", "workers", "sweeps", "webhooks"):
            visitor.open(f"/{path}")
            expect(page.locator(".empty")).to_be_visible()
            inspect(f"empty {path}")
    job_id = rows.job()
    visitor.open(f"/jobs/{job_id}")
    expect(page.locator("#charts-state")).to_contain_text("The curves begin with the first step.")
    inspect("a job before its first step")
    rows.attempt(job_id, progress=curve(1, 50))

    held: list[Route] = []
    page.route("**/curves?*", lambda route: held.append(route))
    visitor.open(f"/jobs/{job_id}")
    expect(page.locator("#charts-state")).to_have_text("Loading the curves …")
    inspect("loading curves")
    for route in held:
        route.continue_()
    page.unroute_all()
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 50")
    page.locator("#figure-loss summary").click()
    inspect("values as a table")

    visitor.open("/new")
    page.get_by_text("From scratch", exact=True).click()
    page.fill("#model_config", '{"model_type": "llama", "hidden_size": 7}')
    page.get_by_text("Example text").click()
    page.locator("summary", has_text="Length and batch").click()
    page.fill("[name='field.max_steps']", "-1")
    expect(page.locator("#check .bad")).to_be_visible(timeout=20_000)
    inspect("faults in the form")

    visitor.open("/files")
    (tmp_path / "bad.tar").write_bytes(b"no archive")
    page.set_input_files("#upload-file", tmp_path / "bad.tar")
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#uploads .bad")).to_be_visible()
    inspect("a rejected upload")

    visitor.open(f"/jobs/{job_id}")
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 50")
    server.end()
    expect(page.locator("#connection")).to_be_visible(timeout=20_000)
    inspect("lost connection")
    server.start()
    expect(page.locator("#connection")).to_be_hidden(timeout=40_000)
    inspect("after a restart of the server")

    page.context.clear_cookies()
    page.get_by_role("radio", name="Tokens").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("link", name="Log in again")).to_be_visible()
    inspect("ended session")
    visitor.faults.clear()  # of rejected requests, and of those while there was no server
