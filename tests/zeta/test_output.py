"""The output of the command line, which escapes untrusted names, messages and logs."""

import json
from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.live import Live

from zeta.cli.estimate_display import estimate_rows
from zeta.cli.event_text import event_text
from zeta.cli.event_views import PlainView, TerminalView
from zeta.cli.job_display import (
    data_cell,
    eval_cell,
    loss_cell,
    model_cell,
    outcome_text,
    status_cell,
    time_cell,
    worker_cell,
)
from zeta.cli.log_sanitizer import LogSanitizer
from zeta.cli.output import duration, print_fields, print_json
from zeta.cli.table import Column, cut_middle, table_lines
from zeta.cli.usage_display import usage_lines
from zeta_core.contract.job.estimate import Estimate
from zeta_core.contract.job.events import EVENT, Event
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.machine_usage import GpuUsageCurves, WorkerUsage

EVIL = "a\x1b[2J\x1b]0;owned\x07\x9b31m\u202etxt.\nqueued\r\x08[red][link=http://x]:bomb:[/]"
DANGEROUS = ("\x1b", "\x07", "\x9b", "\u202e", "\r", "\x08")


def job(**fields: Any) -> Job:
    known = {"id": "job_01kb0000000000000000000000", "project": "p", "created_by": "k", "status": "queued", "spec": {}}
    return Job.model_validate(
        {**known, "resolved_spec": {}, "attempt": 0, "max_retries": 3, "created_at": datetime.now(UTC), **fields}
    )


def event(kind: str, **fields: Any) -> Event:
    return EVENT.validate_python(
        {"seq": 1, "attempt": 1, "type": kind, "created_at": datetime.now(UTC).isoformat(), **fields}
    )


def assert_harmless(text: str, *, lines: int) -> None:
    assert not any(sign in text for sign in DANGEROUS), text
    assert text.count("\n") == lines


def test_names_are_escaped_for_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    (_, row) = table_lines([Column("ID"), Column("NAME")], [("job_1", EVIL)], 500)
    assert_harmless(row, lines=0)
    assert "[red][link=http://x]:bomb:[/]" in row
    print_fields([("name", EVIL)])
    assert_harmless(capsys.readouterr().out, lines=1)
    print_json({"name": EVIL})
    shown = capsys.readouterr().out
    assert_harmless(shown, lines=1)
    assert json.loads(shown) == {"name": EVIL}
    print_json(job(entity_name=EVIL, metadata={"é": "データ\U0001f600"}))
    shown = capsys.readouterr().out
    assert_harmless(shown, lines=1)
    assert "データ" in shown
    assert Job.model_validate_json(shown).entity_name == EVIL


@pytest.mark.parametrize(
    "text_event",
    [
        event("log", message=EVIL),
        event("warning", code="x", message=EVIL, hint=EVIL, patch={"metadata": {EVIL: EVIL}}),
        event("checkpoint", name=EVIL, step=1),
        event("sample", step=1, prompt=EVIL, text=EVIL),
        event("status", status="running", message=EVIL),
        event("progress", phase=EVIL, step=1),
    ],
    ids=lambda text_event: text_event.type,
)
def test_events_are_escaped_for_the_terminal(text_event: Event, capsys: pytest.CaptureFixture[str]) -> None:
    line = event_text(text_event, "job_1") or ""
    assert not any(sign in line for sign in DANGEROUS)
    assert all(more.startswith("    ") for more in line.split("\n")[1:]), "a line of ours is never imitated"
    PlainView("job_1").show(text_event)
    assert not any(sign in capsys.readouterr().out for sign in DANGEROUS)
    screen = StringIO()
    with Live(console=Console(file=screen, width=300)) as live:
        TerminalView(live, "job_1").show(text_event)
    assert "owned\x07" not in screen.getvalue()
    if text_event.type == "log":
        assert "[red][link=http://x]:bomb:[/]" in screen.getvalue()


def test_a_log_keeps_only_colours_on_a_terminal() -> None:
    log = "\x1b[1;31mred\x1b[0m\r\n 10%\r 20%\x1b[K\n\x1b]8;;http://x\x1b\\link\x1b]8;;\x07\ttab\x1b[2J\x1b7\x1bP1$q\x1b\\é\x08\u202e\n"
    plain = "red\n 10%\n 20%\nlink\ttabé\\x08\\u202e\n"
    for cut in range(len(log)):
        for keep_colours in (False, True):
            cleaned = LogSanitizer(keep_colours=keep_colours)
            shown = cleaned.feed(log[:cut]) + cleaned.feed(log[cut:]) + cleaned.end()
            assert shown == (plain.replace("red", "\x1b[1;31mred\x1b[0m") + "\x1b[0m" if keep_colours else plain)
    broken = LogSanitizer(keep_colours=True)
    assert broken.feed("\x1b[" + "1;" * 4000).startswith("\\x1b[1;1;")
    half = LogSanitizer(keep_colours=True)
    assert half.feed("end\x1b[3") + half.end() == "end\\x1b[3"


def test_a_table_of_jobs_fits_80_columns_with_complete_ids() -> None:
    columns = (
        Column("ID"),
        Column("STATUS"),
        Column("MODEL", min_width=8),
        Column("NAME", min_width=8, drop_order=1),
        Column("STEP", drop_order=2),
    )
    job_id, name = "job_" + "x" * 24, "データ" * 20
    row = (job_id, "queued (workers_busy)", "organisation/a-model-with-a-long-name", name, "12/1000")
    lines = table_lines(columns, [row, row], 80)
    assert all(cell_len(line) <= 80 for line in lines)
    assert all(word in lines[1] for word in (job_id, "queued (workers_busy)", "orga…ame", "デ", "12/1000"))
    assert "STEP" not in table_lines(columns, [(*row[:4], "100/1000000")], 80)[0]
    assert table_lines(columns, [row], 300)[1].split() == [*row[:1], "queued", "(workers_busy)", *row[2:]]
    assert "NAME" not in table_lines(columns, [(*row[:3], None, "1")], 300)[0], "a column without any value is left out"
    assert job_id in table_lines(columns, [row], 10)[1]


@pytest.mark.parametrize("width", range(1, 12))
def test_a_long_name_is_shortened_in_the_middle(width: int) -> None:
    for name in ("abcdefghij", "データセット", "a", ""):
        cut = cut_middle(name, width)
        assert cell_len(cut) <= width
        assert cut == name if cell_len(name) <= width else "…" in cut
    assert cut_middle("abcdefghij", 5) == "ab…ij"


def test_model_data_and_reason_are_described_briefly() -> None:
    names = {"file_1": "rows.jsonl", "file_2": "model.tar"}
    for model, expected in (
        ("org/name@main", "org/name@main"),
        ({"config": {"model_type": "llama"}}, "llama from scratch"),
        ({"job": "job_1"}, "job_1/final"),
        ({"file": "file_2"}, "model.tar"),
        ({"builder": "mine"}, "mine"),
    ):
        assert model_cell(job(spec={"model": model}), names) == expected
    for dataset, expected in (
        ({"file": "file_1"}, "rows.jsonl"),
        ({"file": ["file_1", "file_deleted"]}, "rows.jsonl, file_deleted"),
        ([{"hub": "org/data"}, {"path": "a/*.txt"}], "org/data, a/*.txt"),
        ({"builtin": "python-docs"}, "python-docs"),
        (None, None),
    ):
        assert data_cell(job(spec={"dataset": dataset}), names) == expected
    waiting = {"code": "no_worker", "message": "m", "since": datetime.now(UTC)}
    assert status_cell(job(waiting_reason=waiting)) == "queued (no_worker)"
    assert status_cell(job(status="failed", status_reason="out_of_memory")) == "failed (out_of_memory)"
    assert status_cell(job(status="paused", status_reason="paused_by_user")) == "paused"
    assert status_cell(job(status="succeeded", status_reason="completed")) == "succeeded"


def test_losses_of_jobs_are_means_over_windows_of_equal_length() -> None:
    running = job(progress={"loss": 3.0, "recent_loss": 2.5, "eval_loss": 2.25})
    assert (loss_cell(running), eval_cell(running)) == ("2.5000", "2.2500")
    assert (loss_cell(job()), eval_cell(job())) == (None, None)
    assert loss_cell(job(progress={"loss": 3.0})) is None, "the loss of one step is not the mean over a window"
    whole = job(progress={"recent_loss": 2, "eval_loss": 3})
    assert (loss_cell(whole), eval_cell(whole)) == ("2.0000", "3.0000")


def test_the_running_time_covers_all_attempts_of_the_job() -> None:
    def attempt(number: int, start: int, end: int) -> dict[str, Any]:
        at = datetime(2026, 1, 1, tzinfo=UTC)
        times = {"started_at": at + timedelta(seconds=start), "finished_at": at + timedelta(seconds=end)}
        return {"attempt": number, "worker": "w", **times}

    once = job(attempts=[attempt(1, 0, 50)], result={"train_seconds": 4000.0, "train_loss": 2.0}, status="succeeded")
    assert time_cell(once) == duration(50)
    assert f"ran for {duration(50)}." in outcome_text(once), "not the 4,000 seconds of the job that it continues"
    twice = job(attempts=[attempt(1, 0, 50), attempt(2, 100, 120)])
    assert time_cell(twice) == f"{duration(70)} in 2 attempts (the last one {duration(20)})"


def test_a_running_job_shows_its_worker_or_all_its_nodes() -> None:
    attempt = {"attempt": 1, "worker": "a", "started_at": datetime(2026, 1, 1, tzinfo=UTC)}
    nodes = [{"node_rank": rank, "worker": name, "state": "claimed"} for rank, name in enumerate("ab")]
    assert worker_cell(job(attempts=[attempt], worker="a")) == "a"
    assert worker_cell(job(attempts=[{**attempt, "nodes": nodes}], worker="a")) == "a (claimed), b (claimed)"
    assert worker_cell(job(attempts=[{**attempt, "nodes": nodes}])) is None  # it has ended


def test_an_estimate_is_printed_with_separators_and_sizes() -> None:
    checked = {"rows": 1, "complete": True, "formats": ["text"], "sampled_rows": 1, "tokens": 1, "trained_share": 1}
    found = Estimate.model_validate(
        {
            "resolved_spec": {},
            "parameters": 1234567,
            "trainable_parameters": 0,
            "steps": 2000,
            "counted_by": "job_1",
            "disk": {"bytes": 4 * 1576704, "meaning": "at most 4 checkpoints of 1576704 bytes with their state"},
            "data": {**checked, "longest_tokens": 1, "too_long_share": 0},
            "pending": {"tokens": "Unknown, because no worker is connected.", "memory": "A worker knows it."},
        }
    )
    assert dict(estimate_rows(found)) == {
        "data": "1 row (text), about 1 token, 100% trained on",
        "parameters": "1,234,567",
        "trainable parameters": "0",
        "steps": "2,000 (counted by job_1 on the same data)",
        "tokens": "Unknown, because no worker is connected.",
        "memory": "Unknown: A worker knows it.",
        "disk": "6.0 MiB: at most 4 checkpoints of 1.5 MiB with their state",
        "time": "Unknown.",
    }


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_the_usage_of_a_worker_shows_its_gaps_and_fits_the_width(columns: int) -> None:
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
    at = [start + timedelta(seconds=15 * number) for number in range(240) if not 60 <= number < 180]
    cpu = [0.0 if time < start + timedelta(minutes=30) else 1.0 for time in at]
    gpu = GpuUsageCurves(
        device="0", name="NVIDIA H200", utilization=[None] * len(at), memory_bytes=[5 * 2**30] * len(at)
    )
    usage = WorkerUsage(worker="w", interval_seconds=15, at=at, cpu=cpu, memory_bytes=[2**30] * len(at), gpus=[gpu])
    head, cores, memory, busy, gpu_memory = usage_lines(usage, 1, columns)
    assert all(cell_len(line) <= columns for line in (head, cores, memory, busy, gpu_memory))
    curve = cores[head.index("OVER TIME") :]
    quarter = len(curve) // 4
    assert set(curve[: quarter - 1]) == {"▁"}
    assert set(curve[quarter + 1 : 3 * quarter - 1]) == {" "}
    assert set(curve[3 * quarter + 1 :]) == {"█"}
    assert "100 %" in cores
    assert "1.0 GiB" in memory
    assert busy.split()[-1] == "-" or columns < 80
    assert "5.0 GiB" in gpu_memory
    assert ("50 %" in cores) == ("MEAN" in head) == (columns >= 80)
    assert "DEVICE" in head or columns < 80


def test_the_two_reports_that_a_job_runs_have_different_texts() -> None:
    assert event_text(event("status", status="running", worker="w1"), "job_1") == "running on w1"
    assert event_text(event("status", status="running", resolved_spec={}), "job_1") == "resolved all settings"
    assert event_text(event("status", status="queued", reason="preempted"), "job_1") == "queued (preempted)"
