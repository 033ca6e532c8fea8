"""Resuming on the same kind of device is exact; on another kind, the run warns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zeta_core.models import LLAMA_CONFIG
from tests.zeta_core.run_directories import end_of, journal, make_run, start
from zeta_core.checkpoint.checkpoint_files import read_checkpoint
from zeta_core.checkpoint.weights import read_weights
from zeta_core.contract.job.events import StatusLine, WarningLine

# These variables change the device kind of any machine.
OTHER_KIND = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "DNNL_MAX_CPU_ISA": "SSE41"}
SPEC: dict[str, Any] = {
    "model": {"config": {**LLAMA_CONFIG, "attention_dropout": 0.2}},
    "lr_scheduler": "constant",
    "warmup_steps": 0,
}


def run(folder: Path, max_steps: int, *, variables: dict[str, str] | None = None, **fields: Any) -> Path:
    """Train a complete run in its own process. ``fields`` are further fields of its ``run.json``."""
    run_dir = make_run(folder, spec={**SPEC, "max_steps": max_steps}, **fields)
    with start(run_dir, **(variables or {})) as training:
        assert training.wait(240) == 0, (run_dir / "train.log").read_text()[-3000:]
    assert end_of(run_dir).status == "succeeded"
    return run_dir


def final(run_dir: Path) -> Path:
    return run_dir.parent / "output" / "final"


def kind_of(run_dir: Path) -> str:
    """The device kind in the resolved spec, which must equal that in the last checkpoint."""
    running = next(line for line in journal(run_dir) if isinstance(line, StatusLine) and line.resolved_spec)
    assert running.resolved_spec is not None
    checkpoint = read_checkpoint(final(run_dir))
    assert checkpoint is not None
    assert checkpoint.manifest.device_kind == running.resolved_spec["device_kind"]
    return running.resolved_spec["device_kind"]


def warning(run_dir: Path) -> str:
    """The message of the warning, or an empty string without one."""
    lines = (line for line in journal(run_dir) if isinstance(line, WarningLine) and line.code == "device_changed")
    return next((line.message for line in lines), "")


@pytest.mark.slow
def test_a_resumed_run_is_exact_on_its_kind_of_device_and_warns_on_another(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", 6)
    half = run(tmp_path / "half", 3)
    same = run(tmp_path / "same", 6, resume_from=str(final(half)))
    other = run(tmp_path / "other", 6, resume_from=str(final(half)), variables=OTHER_KIND)

    weights, again = read_weights(final(straight)), read_weights(final(same))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert kind_of(straight) == kind_of(half) == kind_of(same) != kind_of(other)
    assert warning(straight) == warning(same) == ""
    message = warning(other)
    assert f"runs on {kind_of(other)}, and the attempt that it continues ran on {kind_of(half)}." in message
    assert "from here on the results can differ in their last bits" in message

    back = run(tmp_path / "back", 8, resume_from=str(final(other)))
    assert f"runs on {kind_of(half)}, and the attempt that it continues ran on {kind_of(other)}." in warning(back)


@pytest.mark.slow
def test_an_attempt_after_one_without_a_checkpoint_warns_as_well(tmp_path: Path) -> None:
    begun = run(tmp_path / "begun", 1, resolved_spec={"device_kind": "cpu:of another machine"})
    assert "ran on cpu:of another machine." in warning(begun)
    older = run(tmp_path / "older", 1, resolved_spec={"threads": 1})
    assert warning(older) == ""
