"""The journal of a run, as its worker reads it."""

from pathlib import Path

from worker.attempt.journal_reader import JournalReader
from zeta_core.contract.job.events import ErrorLine, LogLine
from zeta_core.contract.wire.run_directory import MAX_LINE_BYTES
from zeta_core.report.journal_writer import JournalWriter
from zeta_core.report.reporter import Reporter, WithoutWarnings


def test_a_huge_text_in_a_line_is_truncated(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path / "events.jsonl")
    journal.write(LogLine(message="short"))
    journal.write(ErrorLine(code="invalid_data", message="line 3: " + "€" * MAX_LINE_BYTES, hint="remove it"))
    journal.close()
    reader = JournalReader(tmp_path / "events.jsonl", lambda number, name: None)
    while len(reader) < 2:
        reader.scan()
    assert reader.read(1)["message"] == "short"
    line = reader.read(2)
    assert (line["type"], line["code"], line["hint"]) == ("error", "invalid_data", "remove it")
    assert line["message"].startswith("line 3: €€€")
    assert line["message"].endswith("more characters)")


def test_a_node_after_node_0_does_not_repeat_the_warnings_of_the_run(tmp_path: Path) -> None:
    report = Reporter(WithoutWarnings(JournalWriter(tmp_path / "events.jsonl")))
    report.warn("default_chat_template", "The tokenizer has no chat template.")
    report.phase("training")
    report.close()
    reader = JournalReader(tmp_path / "events.jsonl", lambda number, name: None)
    while not len(reader):
        reader.scan()
    assert [reader.read(number)["type"] for number in range(1, len(reader) + 1)] == ["progress"]
