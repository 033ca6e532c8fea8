"""All benchmarks run, with sizes too small for meaningful figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import demo_start, result
from benchmarks.gpu.__main__ import render
from benchmarks.gpu.contestants import measure
from benchmarks.gpu.workloads import REHEARSAL, WORKLOADS, Measurement


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
    names = [*benchmarks.BENCHMARKS, *benchmarks.ONLY_BY_NAME]
    assert benchmarks.main([*names, "--small"]) == 0
    printed = capsys.readouterr().out
    [file] = (tmp_path / "results").iterdir()
    written = json.loads(file.read_text())
    assert len(written["answers"]) + len(written["skipped"]) == len(names)
    assert written["skipped"].keys() <= {"demo-start", "one-step-job"}
    for found in written["answers"]:
        assert f"| {found['question']} |" in printed
        assert found["ratio"] > 0
        assert all(math.isfinite(value) and value > 0 for values in found["figures"].values() for value in values)
    assert written["machine"]["cores"] >= 1


def test_an_unknown_benchmark_is_rejected_with_the_known_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmarks.main(["throughputs"])
    assert "choose from loop-overhead, throughput" in capsys.readouterr().err


def test_a_benchmark_that_cannot_run_prints_and_stores_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(result, "RESULTS_DIRECTORY", tmp_path)
    assert benchmarks.main(["demo-start", "--small"]) == 0  # its small form would take many minutes
    assert "demo-start was skipped: it sets up four environments" in capsys.readouterr().out
    [file] = tmp_path.iterdir()
    assert json.loads(file.read_text())["skipped"].keys() == {"demo-start"}


def test_the_start_of_a_demo_ends_at_its_first_step(tmp_path: Path) -> None:
    makefile = tmp_path / "Makefile"
    makefile.write_text("demo:\n\t@echo 'setup step'\n\t@sleep 0.5\n\t@echo 'training  step 1/2'\n\t@sleep 600\n")
    assert 0.5 < demo_start.seconds_to_first_line(tmp_path, tmp_path / "caches") < 60
    makefile.write_text("demo:\n\t@echo 'No compiler.'\n")
    with pytest.raises(RuntimeError, match=r"No compiler\."):
        demo_start.seconds_to_first_line(tmp_path, tmp_path / "caches")


@pytest.mark.parametrize(("target_is", "meets_target"), [("maximum", True), ("minimum", False)])
def test_a_target_is_met_in_its_direction(target_is: str, meets_target: bool) -> None:
    about = {"title": "Speed", "unit": "s", "figures": {"zeta": [2.0, 1.0, 4.0]}, "ratio": 0.5, "target": 1.0}
    row = result.BenchmarkResult(**about, target_is=target_is)  # pyright: ignore[reportArgumentType]
    assert row.meets_target is meets_target
    assert result.ratio_of_rounds([1.0, 9.0, 2.0], [2.0, 3.0, 2.0]) == 1.0
    assert "zeta 2 (1 – 4)" in result.markdown_table([row])


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["zeta", "bare loop"])
def test_the_gpu_benchmark_can_be_rehearsed_on_a_cpu(name: str) -> None:
    for workload in REHEARSAL:
        found = measure(name, workload)
        assert found.failure is None
        assert found.seconds_per_step is not None
        assert 0 < found.seconds_per_step < 60


def test_the_page_about_a_gpu_shows_speed_mfu_memory_and_failures() -> None:
    measured = Measurement(seconds_per_step=0.5, peak_bytes=40_000_000_000, attention="flash")
    found = [(WORKLOADS[0], {"zeta": measured, "TRL": Measurement(failure="out of memory")})]
    page = render(found, "9 passed in 60 s", {"gpu": "NVIDIA H100 80GB HBM3"})
    # 1.24 billion weights and attention over 4,096 tokens cost 9.0 GFLOP per token; an H100 has 989 TFLOP/s in bf16.
    assert "| 1B, all weights, 4k tokens | zeta | 32,768 | 29.9% | 40.0 GB | flash |" in page
    assert "| 1B, all weights, 4k tokens | TRL | out of memory |" in page
    assert "9 passed in 60 s" in page
