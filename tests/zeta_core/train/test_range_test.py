"""``learning_rate: "find"``: the chosen rate, its report, and a run identical to one with that rate as a number."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.waiting import wait_until
from tests.zeta_core.models import PlainModel, llama, plain
from tests.zeta_core.objective.test_preference import pair_rows, write_pairs
from tests.zeta_core.parallel.test_parallel import environment, why_no_deepspeed
from tests.zeta_core.run_directories import end_of, journal, make_run, start
from tests.zeta_core.train import range_tests
from tests.zeta_core.train.range_tests import begin, range_test_in, weights
from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.job.events import ProgressLine, StatusLine, WarningLine
from zeta_core.contract.spec.range_test import num_updates
from zeta_core.contract.wire.run_directory import STOP_FILE, StopFile
from zeta_core.failures import CannotTrain, NonFiniteLoss
from zeta_core.train.range_test import steepest


def phases(lines: Any) -> list[str]:
    return [line.phase for line in lines.all if isinstance(line, ProgressLine)]


# --- The chosen rate --------------------------------------------------------------------------------------------------


def test_the_rate_in_the_middle_of_the_steepest_line_is_chosen() -> None:
    rates = [10.0 ** (-5 + at / 10) for at in range(41)]
    curve = [-1 / (1 + (1e-3 / rate) ** 2) + 1e4 * rate**4 for rate in rates]  # falls fastest at 1e-3, then rises
    assert steepest(rates, curve, length=9) == pytest.approx(1e-3)
    assert steepest(rates, curve[:30], length=9) == pytest.approx(1e-3), "a test that ended early has fewer points"
    assert steepest(rates, curve[:8], length=9) is None
    assert steepest(rates, [0.0] * 41, length=9) is None
    assert steepest(rates, list(rates), length=9) is None


def test_a_range_test_has_at_most_a_hundred_updates_and_a_tenth_of_the_run() -> None:
    assert [num_updates(steps) for steps in (199, 200, 640, 1000, 10**6)] == [0, 20, 64, 100, 100]


# --- The run that follows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "lora", "dpo"])
def test_a_found_rate_gives_the_same_bits_as_that_rate_as_a_number(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_split": 0.01} if kind == "plain" else {"lora": {"r": 4, "lora_dropout": 0.1}}
    if kind == "dpo":
        path = write_pairs(tmp_path / "pairs.jsonl", pair_rows(12))
        options |= {"method": "dpo", "dataset": {"path": str(path)}, "seq_len": 128}
    file = "model.safetensors" if kind == "plain" else "adapter_model.safetensors"

    def model() -> torch.nn.Module:
        return plain(dropout=0.1) if kind == "plain" else llama()

    _, lines = begin(model(), tmp_path / "found", **options)
    sentence, found = range_test_in(lines)
    assert phases(lines).index("finding_learning_rate") < phases(lines).index("training")
    assert f"Found learning_rate {found.learning_rate:g}" in sentence
    assert "10% of the run's 200 steps" in sentence
    assert len(found.rates) == len(found.losses) == len(found.losses_at_start) == 19
    assert found.rates[0] < found.learning_rate < found.rates[-1]
    assert lines.resolved_spec["learning_rate"] == found.learning_rate
    assert not any(isinstance(line, WarningLine) and line.code == "unusual_learning_rate" for line in lines.all)
    _, given = begin(model(), tmp_path / "given", **options, learning_rate=found.learning_rate)
    assert "finding_learning_rate" not in phases(given)
    assert weights(tmp_path / "found", file) == weights(tmp_path / "given", file)

    # A resumed run uses the rate that was found, whether the spec requests a range test again or not.
    again, lines = begin(model(), tmp_path / "found", **options, resume=True)
    assert again.progress.step > again.steps_trained > 0
    assert "finding_learning_rate" not in phases(lines)
    begin(model(), tmp_path / "given", **options, learning_rate=None, resume=True)
    assert weights(tmp_path / "found", file) == weights(tmp_path / "given", file)


def test_a_stopped_range_test_leaves_nothing_and_is_repeated(tmp_path: Path) -> None:
    stopped, lines = begin(
        plain(), tmp_path / "a", stop=lambda lines: "pause" if "finding" in str(phases(lines)) else None
    )
    assert (stopped.stopped, stopped.steps_trained, stopped.checkpoint) == ("pause", 0, None)
    assert not any(isinstance(line, StatusLine) for line in lines.all)
    _, again = begin(plain(), tmp_path / "a", resume=True)
    _, whole = begin(plain(), tmp_path / "b")
    assert range_test_in(again)[1].learning_rate == range_test_in(whole)[1].learning_rate
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


class Small(PlainModel):
    """Raises the out-of-memory error of a GPU for batches of more than three sequences."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(ids)


def test_a_run_uses_the_batch_split_that_its_range_test_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, lines = begin(Small(), tmp_path / "small", batch_size=None, gradient_accumulate_every=None)
    halved = [line.patch for line in lines.all if isinstance(line, WarningLine) and line.code == "micro_batch_halved"]
    assert halved[-1] == {"batch_size": 2, "gradient_accumulate_every": 16}
    assert lines.resolved_spec["batch_size"] == 2
    assert phases(lines).count("training") >= 1


# --- Failed range tests -----------------------------------------------------------------------------------------------


def test_a_run_too_short_for_a_range_test_is_rejected_with_a_usual_rate(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidSpec, match="learning_rate is 'find'; the range test needs at least 200 steps, but max_steps is 50"
    ):
        begin(plain(), tmp_path / "run", max_steps=50)
    path = write_pairs(tmp_path / "short.jsonl", [{"text": "A short text."}] * 40)
    with pytest.raises(CannotTrain, match=r"this run has only \d+ steps: the range test needs at least") as raised:
        begin(plain(), tmp_path / "run", max_steps=None, dataset={"path": str(path)})
    rate = (raised.value.patch or {})["learning_rate"]
    outcome, _ = begin(plain(), tmp_path / "run", max_steps=None, dataset={"path": str(path)}, learning_rate=rate)
    assert outcome.steps_trained


class Unteachable(PlainModel):
    """Learns nothing, because its logits do not depend on its weights."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 0.0


class Broken(PlainModel):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * math.nan


def test_a_loss_that_never_falls_or_is_not_finite_fails_the_range_test(tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match="the loss did not fall at any rate from") as raised:
        begin(Unteachable(), tmp_path / "deaf")
    rate = (raised.value.patch or {})["learning_rate"]
    outcome, _ = begin(Unteachable(), tmp_path / "deaf", learning_rate=rate, max_steps=2)
    assert outcome.steps_trained == 2
    with pytest.raises(NonFiniteLoss, match="not finite, before any update"):
        begin(Broken(), tmp_path / "broken")


def test_a_range_test_ends_early_when_the_loss_rises(tmp_path: Path) -> None:
    _, lines = begin(plain(), tmp_path / "run", optimizer="sgd", max_grad_norm=1e30)
    sentence, found = range_test_in(lines)
    assert found.diverged
    assert "ended early" in sentence
    assert found.learning_rate < found.rates[-1]
    assert all(math.isfinite(loss) for loss in found.losses)


# --- Several processes, and a job -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_found_rate_gives_the_same_bits_with_every_strategy(tmp_path: Path) -> None:
    names = [name for name in range_tests.STRATEGIES if not name.startswith("zero") or why_no_deepspeed() is None]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(range_tests.__file__), str(tmp_path), *names]
    launched = subprocess.run(command, env=environment(tmp_path), capture_output=True, timeout=280)
    assert launched.returncode == 0, launched.stderr.decode()[-3000:]
    for name in names:
        assert weights(tmp_path / f"{name}-found") == weights(tmp_path / f"{name}-given"), name


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_next_attempt_of_a_killed_job_uses_the_rate_already_found(tmp_path: Path) -> None:
    spec = {"learning_rate": "find", "max_steps": 100_000, "checkpointing_steps": 100_000}
    first = make_run(tmp_path, spec=spec)
    process = start(first)
    running = lambda: [line for line in journal(first) if isinstance(line, StatusLine)]  # noqa: E731
    wait_until(running, 100, "the end of the range test")
    process.kill()
    process.wait(timeout=30)
    resolved = running()[0].resolved_spec
    assert resolved is not None
    resolved_spec = resolved.as_json()
    assert resolved_spec["learning_rate"] != "find"
    second = make_run(tmp_path, 2, spec=spec, resolved_spec=resolved_spec, resume_from=str(tmp_path / "output"))
    (second / STOP_FILE).write_text(StopFile(action="pause").model_dump_json())
    start(second).wait(timeout=100)
    lines = journal(second)
    assert end_of(second).reason == "paused_by_user"
    assert not any(isinstance(line, ProgressLine) and line.phase == "finding_learning_rate" for line in lines)
    assert [
        line.resolved_spec["learning_rate"] for line in lines if isinstance(line, StatusLine) and line.resolved_spec
    ] == [resolved_spec["learning_rate"]]
