"""The journal of a run, as its worker reads it."""

from pathlib import Path

from worker.attempt.journal_reader import JournalReader
from zeta_core.contract.job.events import ErrorLine, LogLine
from zeta_core.contract.wire.run_directory import MAX_LINE_BYTES
from zeta_core.report.journal_writer import JournalWriter


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
