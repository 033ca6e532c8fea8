"""A run killed by the kernel for memory is recognized by the kernel's counters, and its advice makes it fit."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from server.submitting.reruns import apply_merge_patch
from tests.harness.memory_cgroup import memory_cgroup
from tests.harness.waiting import wait_until
from tests.zeta_core.run_directories import ROOT, journal, make_run
from worker.attempt.final_line import exit_error
from worker.run.process_tree import ProcessTree
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.events import StatusLine
from zeta_core.contract.job.job import JobError, JobErrorEvidence
from zeta_core.contract.job.status import JobStatus, StatusReason
from zeta_core.system.oom_kills import OomKills, count_oom_kills, oom_kill_error

# The logits of a micro-batch of 32 take 1 GB, and training needs three arrays of this size.
WIDE: dict[str, Any] = {
    "model": {"config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                         "num_attention_heads": 2, "vocab_size": 32_000, "max_position_embeddings": 256}},
    "seq_len": 256,
    "batch_size": 32,
    "gradient_accumulate_every": 1,
    "max_steps": 1,
}  # fmt: skip
LIMIT_BYTES = 2_600_000_000


def train_in_group(run_dir: Path, procs: Path) -> ProcessTree:
    """Train a run directory with a real process in the control group, until all of its processes are gone."""
    join = f"echo $$ > {shlex.quote(str(procs))}; exec {shlex.quote(sys.executable)} -m zeta_core {run_dir}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # noqa: TID251 - a child's environment
    job_id = new_id("job")  # the process marks of concurrent tests must differ
    environment |= {"ZETA_JOB_ID": job_id, "ZETA_ATTEMPT": "1"}
    tree = ProcessTree(run_dir, job_id, 1, grace_seconds=5)
    tree.start(["/bin/sh", "-c", join], environment)
    wait_until(lambda: tree.is_gone(has_ended=False, can_save=False), 120, "the run to end")
    return tree


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_oom_kill_is_reported_with_a_patch_that_fits(tmp_path: Path) -> None:
    spec, errors, last = WIDE, list[JobError](), None
    with memory_cgroup(LIMIT_BYTES) as procs:
        while len(errors) < 4:
            run_dir = make_run(tmp_path / f"run-{len(errors)}", spec=spec)
            tree = train_in_group(run_dir, procs)
            last = journal(run_dir)[-1]
            if isinstance(last, StatusLine):
                break
            error = exit_error(tree, has_journal=True)
            assert (error.code, error.evidence.signal) == ("out_of_memory", "SIGKILL"), error
            errors.append(error)
            spec = apply_merge_patch(spec, error.patch)
    assert 0 < len(errors) < 4, f"{len(errors)} patches, at last {spec}"
    assert isinstance(last, StatusLine)
    assert last.status is JobStatus.SUCCEEDED
    assert errors[0].patch == {"batch_size": 16, "gradient_accumulate_every": 2}
    assert "batch_size 16 with gradient_accumulate_every 2" in (errors[0].hint or "")
    evidence = errors[0].evidence.model_extra or {}
    assert (evidence["batch_size"], evidence["seq_len"]) == (32, 256)
    assert evidence["oom_kills_counted_by"] in ("group", "machine")


def test_a_kill_by_another_process_is_not_reported_as_out_of_memory(tmp_path: Path) -> None:
    before = count_oom_kills()
    evidence = JobErrorEvidence(signal=signal.Signals.SIGKILL.name)
    assert oom_kill_error(tmp_path, before, evidence) is None
    assert before.increased_count(before) is None
    assert OomKills(3, 9).increased_count(OomKills(2, 8)) == "group"
    assert OomKills(None, 9).increased_count(OomKills(None, 8)) == "machine"
    assert OomKills(None, None).increased_count(OomKills(None, None)) is None


def test_the_advice_uses_the_options_that_the_run_resolved(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"spec": {"seq_len": 64}, "resolved_spec": {"batch_size": None}}))
    resolved = {"batch_size": 8, "gradient_accumulate_every": 4, "seq_len": 64}
    lines: list[dict[str, Any]] = [
        {"type": "status", "status": "running", "resolved_spec": resolved},
        {"type": "progress", "phase": "training", "step": 3, "memory": {"cpu": 123}},
        {"type": "warning", "code": "micro_batch_halved", "patch": {"batch_size": 4, "gradient_accumulate_every": 8}},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"type": "prog')
    error = oom_kill_error(tmp_path, OomKills(-1, -1), JobErrorEvidence(rank=1))
    assert error is not None
    assert error.code == StatusReason.OUT_OF_MEMORY
    assert error.patch == {"batch_size": 2, "gradient_accumulate_every": 16}
    assert (error.evidence.rank, (error.evidence.model_extra or {})["memory"]) == (1, {"cpu": 123})
