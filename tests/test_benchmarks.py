"""All benchmarks run, with sizes too small for meaningful figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import result


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread, because the other tests use the remaining cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.timeout(480)
def test_every_benchmark_writes_a_table_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(result, "RESULTS_DIRECTORY", tmp_path / "results")
    assert benchmarks.main(["--small"]) == 0
    printed = capsys.readouterr().out
    [file] = (tmp_path / "results").iterdir()
    written = json.loads(file.read_text())
    assert len(written["answers"]) == len(benchmarks.BENCHMARKS)
    for found in written["answers"]:
        assert f"| {found['question']} |" in printed
        assert found["ratio"] > 0
        assert all(math.isfinite(value) and value > 0 for values in found["figures"].values() for value in values)
    assert written["machine"]["cores"] >= 1


def test_an_unknown_benchmark_is_rejected_with_the_known_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmarks.main(["throughputs"])
    assert "choose from loop-overhead, throughput" in capsys.readouterr().err


@pytest.mark.parametrize(("target_is", "meets_target"), [("maximum", True), ("minimum", False)])
def test_a_target_is_met_in_its_direction(target_is: str, meets_target: bool) -> None:
    about = {"title": "Speed", "unit": "s", "figures": {"zeta": [2.0, 1.0, 4.0]}, "ratio": 0.5, "target": 1.0}
    row = result.BenchmarkResult(**about, target_is=target_is)  # pyright: ignore[reportArgumentType]
    assert row.meets_target is meets_target
    assert result.ratio_of_rounds([1.0, 9.0, 2.0], [2.0, 3.0, 2.0]) == 1.0
    assert "zeta 2 (1 – 4)" in result.markdown_table([row])
