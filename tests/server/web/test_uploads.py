"""Uploads in a real browser: chosen and dropped files, also after a lost connection or a reload."""

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.harness.browser import Visitor
from tests.harness.waiting import wait_until
from tests.server.rows import some_bytes
from tests.server.server_process import ServerProcess

Visit = Callable[..., Visitor]
PART_BYTES = 8 << 20
DROP = """([name, text]) => {
  const dropped = new DataTransfer();
  dropped.items.add(new File([text], name));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true, cancelable: true }));
}"""


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """A text file of three parts."""
    path = tmp_path / "large.txt"
    path.write_text(some_bytes(PART_BYTES + 1000, seed=1).hex())
    return path


def limit_speed(page: Page, bytes_per_second: int) -> None:
    """Let the browser upload slowly."""
    conditions = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": bytes_per_second}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", conditions)


def num_parts(server: ServerProcess) -> int:
    """The number of stored parts of unfinished uploads."""
    return len([path for path in (server.settings.artifacts / "uploads").glob("*/*") if path.is_file()])


def wait_for_first_part(page: Page) -> None:
    """Wait until the browser knows that the first part is stored."""

    def num_known() -> int:
        uploads = json.loads(page.evaluate("localStorage.getItem('zeta.uploads')") or "[]")
        return sum(len(upload["partIds"]) for upload in uploads)

    wait_until(lambda: num_known() == 1, 60, "the first part to be stored")


def start_upload(page: Page, path: Path) -> None:
    page.set_input_files("#upload-file", path)
    page.get_by_role("button", name="Upload").click()


def test_a_file_is_uploaded_and_trained_on(visit: Visit, http: httpx.Client) -> None:
    page = visit().page
    page.goto(page.url + "files")
    page.set_input_files("#upload-file", {"name": "rows.txt", "mimeType": "text/plain", "buffer": b"some text\n" * 50})
    page.get_by_role("button", name="Upload").click()
    page.get_by_role("link", name="Train on it").first.click()
    chosen = page.input_value("#data_file")
    file = http.get(f"/v1/files/{chosen}").json()
    assert (file["filename"], file["bytes"], file["purpose"]) == ("rows.txt", 500, "dataset")
    page.goto(page.url.partition("/new")[0] + "/files")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete rows.txt").click()
    expect(page.get_by_text("No files yet.")).to_be_visible()
    assert http.get(f"/v1/files/{chosen}").status_code == 404


def test_a_rejected_upload_says_why(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    page.goto(page.url + "files")
    page.set_input_files(
        "#upload-file", {"name": "model.tar", "mimeType": "application/x-tar", "buffer": b"no archive"}
    )
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#uploads .bad")).to_contain_text("is not a .tar archive")
    page.reload()
    expect(page.locator("#uploads li")).to_have_count(0)
    visitor.faults = [fault for fault in visitor.faults if "status of 4" not in fault]


@pytest.mark.extended
def test_an_upload_survives_a_restart_of_the_server(
    visit: Visit, server: ServerProcess, http: httpx.Client, large_file: Path
) -> None:
    visitor = visit()
    page = visitor.page
    page.goto(page.url + "files")
    limit_speed(page, 6 << 20)
    start_upload(page, large_file)
    wait_for_first_part(page)
    server.end(signal.SIGKILL)
    expect(page.locator("#uploads .waiting")).to_contain_text("The upload continues by itself.", timeout=20_000)
    server.start()
    expect(page.locator("tr", has_text="large.txt")).to_be_visible(timeout=60_000)
    assert http.get("/v1/files").json()["data"][0]["sha256"] == hashlib.sha256(large_file.read_bytes()).hexdigest()
    assert num_parts(server) == 0
    visitor.faults.clear()  # of the requests while there was no server


@pytest.mark.extended
def test_an_upload_continues_after_a_reload(visit: Visit, server: ServerProcess, large_file: Path) -> None:
    page = visit().page
    page.goto(page.url + "files")
    rows = page.locator("tr", has_text="large.txt")
    num_earlier = rows.count()
    limit_speed(page, 6 << 20)
    start_upload(page, large_file)
    wait_for_first_part(page)
    page.reload()
    line = page.locator("#uploads li", has_text="large.txt")
    expect(line).to_contain_text("interrupted at 8.0 MiB of 16.0 MiB. Choose the file again to continue.")
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url.rpartition("/")[2]))
    start_upload(page, large_file)
    expect(rows).to_have_count(num_earlier + 1, timeout=60_000)
    assert sent.count("parts") == 2
    assert "uploads" not in sent  # no new upload was started


def test_an_interrupted_upload_is_discarded(visit: Visit, server: ServerProcess, large_file: Path) -> None:
    page = visit().page
    page.goto(page.url + "files")
    limit_speed(page, 6 << 20)
    start_upload(page, large_file)
    wait_for_first_part(page)
    page.get_by_role("button", name="Cancel large.txt").click()
    expect(page.locator("#uploads li")).to_contain_text("cancelled")
    wait_until(lambda: num_parts(server) == 0, 10, "the parts to be removed")
    page.reload()
    expect(page.locator("#uploads li")).to_have_count(0)


def test_a_file_dropped_on_the_form_is_chosen(visit: Visit, http: httpx.Client) -> None:
    page = visit().page
    page.goto(page.url + "new")
    page.evaluate(DROP, ["chats.jsonl", '{"text": "a"}'])
    expect(page.locator("#data_file option:checked")).to_have_text("chats.jsonl")
    chosen = http.get(f"/v1/files/{page.input_value('#data_file')}").json()
    assert (chosen["filename"], chosen["bytes"]) == ("chats.jsonl", 13)
