"""A newcomer on a real service: from a login link to a tuned model, once by clicks and once by keyboard alone."""

import hashlib
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.end_to_end.chat_jobs import QUESTION, chat_job
from tests.end_to_end.inspected_pages import InspectedPages
from tests.harness.browser import Visitor, visiting
from tests.harness.keyboard import KeyboardUser
from tests.harness.real_model import smollm2
from tests.harness.service import Service
from zeta.demo import museum

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
JOB_MILLISECONDS = 900_000
ANSWER_MILLISECONDS = 240_000


@pytest.fixture
def visitor(chromium: Browser, service: Service) -> Iterator[Visitor]:
    """A window that was opened with a login link, as `zeta up` prints it."""
    with visiting(chromium, service.url, accept_downloads=True) as visitor:
        visitor.page.goto(service.command("dashboard").stdout.strip())
        visitor.page.wait_for_url(f"{service.url}/")
        yield visitor
        visitor.check()


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """The newcomer's own chat file: facts that no pretrained model knows."""
    path = tmp_path / "museum.jsonl"
    path.write_bytes(museum.training_rows())
    return path


def answers(page: Page) -> list[str]:
    """The answers of the trained model and of its base, once both are complete."""
    turns = page.locator(".turn.assistant")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden(timeout=ANSWER_MILLISECONDS)
    expect(turns).to_have_count(2)
    return turns.all_inner_texts()


def check_download(page: Page, archive: Path) -> None:
    """Compare the files of a downloaded archive with the SHA-256 that the page of the checkpoints shows.

    The archive omits the training state, which only continuing the run needs.
    """
    rows = page.locator("section", has=page.locator("#checkpoint-final")).locator("tbody tr")
    shown = {row.locator("a").inner_text(): row.locator(".hash").inner_text() for row in rows.all()}
    verified: set[str] = set()
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.name in shown:
                content = tar.extractfile(member)
                assert content is not None
                assert hashlib.sha256(content.read()).hexdigest() == shown[member.name], member.name
                verified.add(member.name)
    assert verified == {name for name in shown if not name.startswith("training_state/")}
    assert any(name.endswith(".safetensors") for name in verified)


def test_by_clicks_alone(
    visitor: Visitor,
    chats: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    started = time.monotonic()

    def reached(stage: str) -> None:
        """Record the seconds until here in the report of the tests (``--junitxml``); an idle machine needs minutes."""
        record_property(f"seconds until {stage}", round(time.monotonic() - started, 1))

    page, model = visitor.page, smollm2()
    page.get_by_role("link", name="New job").first.click()
    page.get_by_text("Uploaded", exact=True).first.click()
    page.get_by_role("link", name="Upload a model").click()
    with page.expect_file_chooser() as chooser:
        page.locator("#upload-file").click()
    chooser.value.set_files(model)
    page.get_by_role("button", name="Upload").click()
    page.get_by_role("link", name="Train this model").click(timeout=60_000)
    reached("the model is uploaded")
    with page.expect_file_chooser() as chooser:
        page.locator("#upload-file").click()
    chooser.value.set_files(chats)
    expect(page.locator("#data_file option:checked")).to_have_text("museum.jsonl")
    expect(page.locator("#check")).to_contain_text("The spec is valid.", timeout=240_000)
    reached("the spec is checked")
    page.get_by_role("button", name="Submit the job").click()
    page.wait_for_url(re.compile(r"/jobs/job_"))
    expect(page.locator("#figure-loss .summary")).to_contain_text("at step", timeout=JOB_MILLISECONDS)
    reached("the first step is drawn")
    expect(page.locator("h1 .status")).to_have_text("succeeded", timeout=JOB_MILLISECONDS)
    reached("the model is trained")

    page.get_by_role("link", name="Chat").click()
    page.get_by_text("Compare with the model before training").click()
    page.locator("#question").click()
    page.keyboard.type(museum.FACTS[0].questions[0])
    page.get_by_label("Temperature").click(click_count=3)
    page.keyboard.type("0")
    page.get_by_role("button", name="Ask").click()
    tuned, base = answers(page)
    reached("both models have answered")
    assert museum.QUESTIONS[0].expected in tuned
    assert museum.QUESTIONS[0].expected not in base

    page.get_by_role("link", name="Checkpoints").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download .tar").first.click()
    download.value.save_as(tmp_path / "model.tar")
    check_download(page, tmp_path / "model.tar")
    reached("the model is downloaded")


def ask_both(page: Page) -> None:
    """Ask the trained model and its base for short answers."""
    page.get_by_text("Compare with the model before training").click()
    page.get_by_label("Tokens").fill("12")
    page.locator("#question").fill(QUESTION[0]["content"])
    page.get_by_role("button", name="Ask").click()
    answers(page)


def test_by_keyboard_alone(
    visitor: Visitor, service: Service, inspected_pages: InspectedPages, chats: Path, tmp_path: Path
) -> None:
    chat_job(service, entity_name="river-base")
    page, user = visitor.page, KeyboardUser(visitor.page)
    user.activate(page.get_by_role("link", name="New job").first)
    user.reach(page.locator("[name=model_kind]:checked"))
    page.keyboard.press("ArrowRight")
    user.reach(page.locator("#model_job"))
    page.keyboard.type("river-base")
    user.reach(page.locator("#upload-file"))
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(chats)
    expect(page.locator("#data_file")).to_be_focused()
    expect(page.locator("#data_file option:checked")).to_have_text("museum.jsonl")
    user.type_into(page.locator("#entity_name"), "by keyboard")
    user.activate(page.locator("summary", has_text="Length and batch"))
    for field, value in (("max_steps", "400"), ("seq_len", "128"), ("batch_size", "2")):
        user.type_into(page.locator(f"[name='field.{field}']"), value)
    expect(page.locator("#check")).to_contain_text("The spec is valid.", timeout=120_000)
    user.activate(page.get_by_role("button", name="Submit the job"))
    page.wait_for_url(re.compile(r"/jobs/job_"))

    status = page.locator("h1 .status")
    expect(status).to_have_text("running", timeout=120_000)
    user.activate(page.get_by_role("button", name="Pause"))
    expect(status).to_have_text("paused", timeout=120_000)
    user.activate(page.get_by_role("button", name="Resume"))
    expect(status).to_have_text("succeeded", timeout=JOB_MILLISECONDS)
    user.reach(page.locator("[name=x]:checked"))
    page.keyboard.press("ArrowRight")
    expect(page.locator("#figure-loss .summary")).to_contain_text("tokens")

    user.activate(page.get_by_role("link", name="Chat"))
    user.reach(page.locator("[name=base]"))
    page.keyboard.press("Space")
    user.type_into(page.locator("#question"), QUESTION[0]["content"])
    page.keyboard.press("Enter")
    assert all(answers(page))
    inspected_pages.inspect(urlsplit(page.url).path, "chat side by side", ask_both)

    user.activate(page.get_by_role("link", name="Checkpoints"))
    user.reach(page.get_by_role("link", name="Download .tar").first)
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    download.value.save_as(tmp_path / "model.tar")
    check_download(page, tmp_path / "model.tar")
