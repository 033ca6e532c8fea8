"""The command line in a real terminal of 40 to 200 columns, with and without colour."""

import pytest
from rich.cells import cell_len

from tests.harness.service import ZETA, Service
from tests.harness.terminals import Terminal, TerminalSession, run_in_terminal
from zeta.client import Client
from zeta_core.contract.job.job import Job

pytestmark = pytest.mark.timeout(300)

WIDTHS = (40, 60, 80, 120, 200)


def zeta(service: Service, columns: int, *words: str, **variables: str) -> TerminalSession:
    return run_in_terminal([ZETA, *words], {**service.environment(), **variables}, columns=columns)


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_followed_job_fits_the_terminal(service: Service, finished_job: Job, columns: int) -> None:
    shown = zeta(service, columns, "wait", finished_job.id)
    assert shown.status == 0, shown.text
    (line,) = [line for line in shown.lines if "8/8" in line]
    assert "loss" in line
    assert ("tokens/s" in line) == (columns >= 80)
    assert ("━━━━" in line) == (columns >= 60)
    assert "█" in line or columns < 80, "the curve of the loss"
    assert shown.is_coloured or columns < 60, "the bar and the curve are coloured"
    assert f"{finished_job.id} succeeded" in "".join(shown.lines), "the outcome may wrap"


def test_a_followed_job_has_no_colour_if_the_user_wants_none(service: Service, finished_job: Job) -> None:
    shown = zeta(service, 100, "wait", finished_job.id, NO_COLOR="1")
    assert not shown.is_coloured
    assert "8/8" in shown.text
    dumb = zeta(service, 100, "wait", finished_job.id, TERM="dumb")
    assert b"\x1b" not in dumb.written
    assert "step 8/8" in dumb.text


def test_ctrl_c_in_a_terminal_leaves_the_job_and_names_the_next_commands(
    service: Service, client: Client, endless_job: Job
) -> None:
    with Terminal([ZETA, "wait", endless_job.id], service.environment(), columns=90) as terminal:
        terminal.read_until("/1000000  loss")
        terminal.type("\x03")
        ended = terminal.finish()
    assert ended.status == 130
    assert f"zeta cancel {endless_job.id}" in "".join(ended.lines)
    assert client.job(endless_job.id).status == "running"


@pytest.mark.parametrize("columns", WIDTHS)
def test_top_shows_the_running_job_and_its_device(service: Service, endless_job: Job, columns: int) -> None:
    with Terminal([ZETA, "top", "--interval", "0.2"], service.environment(), columns=columns) as terminal:
        terminal.read_until("TOKENS/S" if columns >= 120 else "LEFT" if columns >= 80 else "running")
        # The worker reports the jobs on its devices with its heartbeat, so the job is listed as running first.
        lines = terminal.read_until(endless_job.id, times=2)
        assert any(endless_job.id in line and "running" in line for line in lines)
        assert any("/1000000" in line for line in lines) or columns < 80
        terminal.type("\x03")
        assert terminal.finish().status == 0


@pytest.mark.parametrize("columns", [40, 80, *(pytest.param(w, marks=pytest.mark.extended) for w in (60, 120, 200))])
def test_tables_and_texts_fit_the_terminal(service: Service, finished_job: Job, columns: int) -> None:
    commands = (
        *("jobs", "workers", "keys", "audit", "config", "--help"),
        *(f"job {finished_job.id}", f"checkpoints {finished_job.id}", "projects show default", "job nope"),
    )
    for command in commands:
        shown = zeta(service, columns, *command.split())
        lines = shown.written.decode().splitlines()
        too_long = [line for line in lines if cell_len(line) > columns and len(line.split()) > 1]
        assert too_long == [], f"only single words may exceed the width: {command}"


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_chart_fits_the_terminal(service: Service, finished_job: Job, columns: int) -> None:
    shown = zeta(service, columns, "plot", finished_job.id)
    assert shown.status == 0, shown.text
    assert shown.is_coloured
    frame = next(line for line in shown.lines if "┌" in line)
    assert columns - 2 <= len(frame) <= columns
    assert f"━━ {finished_job.id}" in shown.text
    plain = zeta(service, columns, "plot", finished_job.id, "--metric", "grad_norm", "--log", NO_COLOR="1")
    assert not plain.is_coloured
    assert "grad_norm, logarithmic" in plain.text
