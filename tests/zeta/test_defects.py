"""A defect of the command line is reported in a file that no other user can prepare or read."""

import stat
import tempfile
from pathlib import Path

import pytest

from zeta.cli.failures import report_failure


def test_each_defect_has_a_private_file_with_an_unpredictable_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for _ in range(2):
        report_failure(AssertionError("a defect"), as_json=False)
        assert "This is a bug in zeta" in capsys.readouterr().err
    reports = list(tmp_path.iterdir())
    assert len(reports) == 2, "two defects of one process do not share a file"
    for report in reports:
        assert stat.S_IMODE(report.stat().st_mode) == 0o600
        assert "AssertionError: a defect" in report.read_text()
