"""Exporting a checkpoint in the dashboard, and the pages of the export job."""

from collections.abc import Callable

import httpx
import pytest

from tests.harness.browser import Visitor
from tests.server.web.conftest import Jobs

Visit = Callable[..., Visitor]


@pytest.mark.extended
def test_a_checkpoint_is_exported_with_its_button(visit: Visit, jobs: Jobs, http: httpx.Client) -> None:
    visitor = visit()
    visitor.open(f"/jobs/{jobs.succeeded}/checkpoints")
    visitor.page.get_by_label("Format of the export").select_option("GGUF q8_0")
    visitor.page.get_by_role("button", name="Export").click()
    visitor.page.wait_for_url(lambda url: not url.endswith("/checkpoints"))
    job_id = visitor.page.url.rpartition("/")[2]
    job = http.get(f"/v1/jobs/{job_id}").json()
    assert (job["kind"], job["spec"]["to"], job["spec"]["type"]) == ("export", "gguf", "q8_0")
    tabs = visitor.page.get_by_role("navigation", name="Views of this job").get_by_role("link").all_inner_texts()
    assert tabs == ["Overview", "Log", "Events", "Checkpoints", "Settings"]
    for tab in ("", "/log", "/events", "/checkpoints", "/settings"):
        visitor.open(f"/jobs/{job_id}{tab}")
    visitor.open("/?kind=export")
    assert visitor.page.locator("table.jobs tbody tr").count() == 1
    assert visitor.page.get_by_text("export to gguf").count() == 1
