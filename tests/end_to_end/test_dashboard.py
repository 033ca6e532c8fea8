"""The dashboard on a real service: from the printed link to the downloaded model, by clicks in a real browser."""

import hashlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.end_to_end.inspected_pages import InspectedPages
from tests.end_to_end.specs import TINY_LLAMA
from tests.harness.browser import Visitor, visiting
from tests.harness.invented_chats import facts, write_training_chats
from tests.harness.service import Service
from tests.harness.waiting import wait_until
from zeta.up.home import Home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def visitor(chromium: Browser, service: Service) -> Iterator[Visitor]:
    """A window that was opened with the link that `zeta up` printed, or another one."""
    with visiting(chromium, service.url, accept_downloads=True) as visitor:
        link = service.command("dashboard").stdout.strip()
        visitor.page.goto(link)
        visitor.page.wait_for_url(f"{service.url}/")
        yield visitor
        visitor.check()


def submit_by_form(page: Page, name: str, steps: int) -> str:
    """Fill in the form for a small model, submit it, and return the job's id."""
    page.get_by_role("link", name="New job").first.click()
    page.get_by_text("From scratch", exact=True).click()
    page.fill("#model_config", json.dumps(TINY_LLAMA))
    page.get_by_text("Example text").click()
    page.fill("#entity_name", name)
    page.get_by_text("Length and batch").click()
    for field, value in (("max_steps", steps), ("seq_len", 64), ("batch_size", 4)):
        page.fill(f"[name='field.{field}']", str(value))
    page.get_by_text("Evaluation and checkpoints").click()
    page.fill("[name='field.checkpointing_steps']", "10")
    page.fill("[name='field.eval_split']", "0.05")
    expect(page.locator("#check")).to_contain_text("The spec is valid.", timeout=120_000)
    page.get_by_role("button", name="Submit the job").click()
    page.wait_for_url(re.compile(r"/jobs/job_"))
    return page.url.rpartition("/")[2]


def shown_steps(page: Page) -> int:
    return int(page.locator("[data-value=step]").inner_text().replace(",", "").replace("–", "0"))


def test_zeta_up_prints_a_link_that_logs_in(service: Service) -> None:
    link = re.compile(rf"dashboard  {service.url}/login\?link=[\w-]{{43}} ")
    wait_until(lambda: link.search((service.home / "up.out").read_text()), 30, "zeta up to print a link")


def test_a_job_from_the_form_to_the_download(visitor: Visitor, service: Service, tmp_path: Path) -> None:
    page = visitor.page
    job_id = submit_by_form(page, "by clicks", 60)
    expect(page.locator("h1 .status")).to_have_text("succeeded", timeout=240_000)
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 60")
    with service.http() as http:
        metrics = http.get(f"/v1/jobs/{job_id}/metrics").json()
        manifest = http.get(f"/v1/jobs/{job_id}/checkpoints/final").json()
    assert metrics["step"] == list(range(1, 61))
    page.get_by_role("link", name="Chat").click()
    page.fill("#question", "What is a statement?")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator(".turn.failed")).to_contain_text("This model has no chat template", timeout=120_000)
    visitor.faults = [fault for fault in visitor.faults if "status of 4" not in fault]
    page.get_by_role("link", name="Data").click()
    expect(page.get_by_text("Lengths of documents in tokens")).to_be_visible()
    page.get_by_role("link", name="Checkpoints").click()
    sums = {file["path"]: file["sha256"] for file in manifest["files"]}
    expect(page.locator("#checkpoint-final")).to_be_visible()
    assert sums["model.safetensors"] in page.content()
    with page.expect_download() as download:
        page.get_by_role("link", name="model.safetensors").first.click()
    download.value.save_as(tmp_path / "model.safetensors")
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert digest == sums["model.safetensors"]


def test_rows_of_an_uploaded_file_are_shown_token_by_token(
    visitor: Visitor, inspected_pages: InspectedPages, tmp_path: Path
) -> None:
    page = visitor.page
    write_training_chats(tmp_path / "chats.jsonl", facts(2), 4)
    page.get_by_role("link", name="Files").click()
    page.set_input_files("#upload-file", tmp_path / "chats.jsonl")
    page.get_by_role("button", name="Upload").click()
    row = page.locator("tr", has_text="chats.jsonl")
    row.get_by_role("link", name="Show rows").click()
    tokens = page.locator("#preview .tokens").first
    expect(tokens).to_be_visible(timeout=120_000)
    expect(tokens.locator(".trained").first).to_contain_text("(trained on:)")
    expect(tokens.locator(".context").first).to_contain_text("(context:)")
    page.fill("#seq_len", "40")
    page.get_by_role("button", name="Show rows").click()
    expect(tokens.locator(".truncated")).to_have_count(1, timeout=120_000)
    page.get_by_text("Tokens as a table").first.click()
    expect(page.locator("#preview table").first.get_by_role("row").nth(41)).to_contain_text("cut off")
    rows_path = urlsplit(page.url).path
    page.get_by_role("link", name="Train on it").click()
    page.get_by_role("button", name="Show rows").click()
    expect(page.locator("#preview .tokens").first).to_be_visible(timeout=120_000)
    inspected_pages.inspect(rows_path, "rows token by token", show_short_rows)


def show_short_rows(page: Page) -> None:
    """Show rows that are partly cut off, the first one also as a table."""
    page.fill("#seq_len", "40")
    page.get_by_role("button", name="Show rows").click()
    expect(page.locator("#preview .truncated").first).to_be_visible(timeout=120_000)
    page.get_by_text("Tokens as a table").first.click()


def test_a_job_is_paused_resumed_and_cancelled(visitor: Visitor) -> None:
    page = visitor.page
    submit_by_form(page, "commands", 100_000)
    status = page.locator("h1 .status")
    expect(status).to_have_text("running", timeout=120_000)
    page.get_by_role("button", name="Pause").click()
    expect(status).to_have_text("paused", timeout=120_000)
    page.get_by_role("button", name="Resume").click()
    expect(status).to_have_text("running", timeout=120_000)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Cancel").click()
    expect(status).to_have_text("cancelled", timeout=120_000)


def test_the_curve_survives_a_kill_of_the_server(visitor: Visitor, service: Service) -> None:
    page = visitor.page
    job_id = submit_by_form(page, "restart", 3000)
    wait_until(lambda: shown_steps(page) >= 20, 120, "the first steps")
    state = Home(service.home).running()
    assert state is not None
    os.kill(state.children["server"], signal.SIGKILL)
    before = shown_steps(page)
    wait_until(lambda: shown_steps(page) > before + 200, 120, "steps after the restart")
    expect(page.locator("h1 .status")).to_have_text("succeeded", timeout=240_000)
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step 3,000")
    page.fill("input[name=first]", "1")
    page.fill("input[name=last]", "12")
    page.keyboard.press("Enter")
    page.locator("#figure-loss summary").click()
    expect(page.locator("#figure-loss tbody th")).to_have_text([str(step) for step in range(1, 13)])
    with service.http() as http:
        steps = http.get(f"/v1/jobs/{job_id}/metrics").json()["step"]
    assert len(set(steps)) == len(steps)
    assert steps[-1] == 3000
    visitor.faults.clear()  # of the requests while there was no server
