"""``python -m zeta_core RUN_DIR``: the journal, the checkpoints, and every way to end."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.waiting import wait_until
from tests.zeta_core.models import LLAMA_CONFIG, plain
from tests.zeta_core.run_directories import end_of, journal, make_run, start
from tests.zeta_core.runs import train
from zeta_core.contract.job.checkpoint import Manifest
from zeta_core.contract.job.events import CheckpointLine, ErrorLine, ProgressLine, StatusLine, WarningLine
from zeta_core.contract.wire.run_directory import SAVE_FILE, SaveFile
from zeta_core.process import launch
from zeta_core.process.stop import Interrupted, Stop
from zeta_core.process.worker_monitor import WorkerMonitor

DROPOUT = {"model": {"config": {**LLAMA_CONFIG, "attention_dropout": 0.2}}, "max_steps": 24}


def run_here(run_dir: Path) -> int:
    """Run the same entry point in this process."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return launch.main(run_dir)
    finally:
        signal.signal(signal.SIGTERM, before)


def weights(output_dir: Path) -> bytes:
    return (output_dir / "final" / "model.safetensors").read_bytes()


def install_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, code: str, function: str) -> str:
    """Install a model builder as an operator does; returns the name that a spec uses for it."""
    about = tmp_path / "installed" / f"{module}-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\n")
    (about / "entry_points.txt").write_text(f"[zeta.models]\n{module} = {module}:{function}\n")
    (about.parent / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(str(about.parent))
    return module


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with dropout."""
    run_dir = make_run(tmp_path_factory.mktemp("straight"), spec=DROPOUT)
    assert start(run_dir).wait(timeout=100) == 0, (run_dir / "train.log").read_text()
    return run_dir


def test_the_journal_describes_the_whole_run(straight: Path) -> None:
    lines = journal(straight)
    running = next(line for line in lines if isinstance(line, StatusLine))
    assert running.status == "running"
    resolved = running.resolved_spec or {}
    expected = {"seed": 42, "total_steps": 24, "global_batch_size": 4, "weight_decay": 0.1, "dtype": "float32"}
    assert {name: resolved[name] for name in expected} == expected
    phases = [line.phase for line in lines if isinstance(line, ProgressLine)]
    assert [phase for phase in ("loading_data", "loading_model", "training", "saving") if phase in phases] == list(
        dict.fromkeys(phases)
    )
    steps = [line for line in lines if isinstance(line, ProgressLine) and line.loss is not None]
    assert (steps[0].step, steps[-1].step) == (1, 24)
    assert 0 < (steps[-1].learning_rate or 0) < 0.01 * resolved["learning_rate"], "the rate of the last step"
    assert (steps[0].loss or 0) > (steps[-1].loss or 0)
    assert [line.name for line in lines if isinstance(line, CheckpointLine)][-2:] == ["step-24", "final"]
    end = end_of(straight)
    assert (end.status, end.reason) == ("succeeded", "completed")
    assert end.result is not None
    assert end.result.tokens == 24 * 4 * 32


@pytest.mark.extended
def test_a_requested_checkpoint_is_saved_at_once_and_changes_nothing(straight: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, spec=DROPOUT)
    (run_dir / SAVE_FILE).write_text(SaveFile(number=3).model_dump_json())
    assert start(run_dir).wait(timeout=100) == 0, (run_dir / "train.log").read_text()
    saved = [(line.name, line.request) for line in journal(run_dir) if isinstance(line, CheckpointLine)]
    assert saved[0] == ("step-1", 3)
    assert [request for _, request in saved[1:]] == [None] * (len(saved) - 1), "once for each number"
    assert weights(tmp_path / "output") == weights(straight.parent / "output")


def test_the_final_checkpoint_is_a_hugging_face_model(straight: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = straight.parent / "output" / "final"
    manifest = Manifest.model_validate_json((final / "manifest.json").read_bytes())
    assert (manifest.format, manifest.step, manifest.name) == ("huggingface", 24, "final")
    model: Any = AutoModelForCausalLM.from_pretrained(final)
    assert model.config.use_cache
    tokenizer: Any = AutoTokenizer.from_pretrained(final)
    ids = tokenizer("The", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    assert torch.load(straight.parent / "output" / "checkpoint.pt", weights_only=True)["name"] == "final"


@pytest.mark.extended
def test_a_run_that_was_killed_paused_and_handed_back_ends_with_the_same_bits(straight: Path, tmp_path: Path) -> None:
    def checkpoint_in(run_dir: Path) -> bool:
        return any(isinstance(line, CheckpointLine) for line in journal(run_dir))

    output = str(tmp_path / "output")
    killed = make_run(tmp_path, 1, spec=DROPOUT)
    process = start(killed)
    wait_until(lambda: checkpoint_in(killed), 60, "a first checkpoint")
    process.kill()
    process.wait()
    assert not any(isinstance(line, StatusLine) and line.status != "running" for line in journal(killed))

    paused = make_run(tmp_path, 2, spec=DROPOUT, resume_from=output)
    (paused / "stop").write_text(json.dumps({"action": "pause"}))
    assert run_here(paused) == 0
    assert (end_of(paused).status, end_of(paused).reason) == ("paused", "paused_by_user")

    handed_back = make_run(tmp_path, 3, spec=DROPOUT, resume_from=output)
    process = start(handed_back)
    wait_until(lambda: any(isinstance(line, ProgressLine) and line.step for line in journal(handed_back)), 60, "a step")
    process.terminate()
    assert process.wait(timeout=60) == 0
    end = end_of(handed_back)
    if end.status != "succeeded":  # the signal may come after the last step
        assert (end.status, end.reason) == ("queued", "handed_back")

    last = make_run(tmp_path, 4, spec=DROPOUT, resume_from=output)
    assert run_here(last) == 0
    assert end_of(last).status == "succeeded"
    assert weights(tmp_path / "output") == weights(straight.parent / "output")


def test_cancel_ends_without_a_checkpoint(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, spec={"checkpointing_steps": 1})
    (run_dir / "stop").write_text(json.dumps({"action": "cancel"}))
    assert run_here(run_dir) == 0
    assert (end_of(run_dir).status, end_of(run_dir).reason) == ("cancelled", "cancelled_by_user")
    assert not list((tmp_path / "output").glob("step-*"))


_LOADS_FOR_LONG = """
import pathlib, threading
def build(file):
    pathlib.Path(file).touch()
    threading.Event().wait(600)
"""


@pytest.mark.parametrize(
    ("requested", "end"), [("cancel", ("cancelled", "cancelled_by_user")), (None, ("queued", "handed_back"))]
)
def test_sigterm_before_the_first_step_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requested: str | None, end: tuple[str, str]
) -> None:
    builder = install_builder(tmp_path, monkeypatch, "loading_model", _LOADS_FOR_LONG, "build")
    begun = tmp_path / "begun"
    run_dir = make_run(tmp_path, spec={"model": {"builder": builder, "arguments": {"file": str(begun)}}})

    def stop_when_it_loads() -> None:
        wait_until(begun.exists, 30, "the model to be built")
        if requested is not None:
            (run_dir / "stop").write_text(json.dumps({"action": requested}))
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop_when_it_loads)
    stopping.start()
    assert run_here(run_dir) == 0
    stopping.join()
    assert (end_of(run_dir).status, end_of(run_dir).reason) == end
    assert not [line for line in journal(run_dir) if isinstance(line, ErrorLine)]


def test_sigterm_during_the_import_of_torch_interrupts_once_after_it(tmp_path: Path) -> None:
    stop = Stop(tmp_path / "stop", WorkerMonitor(tmp_path / "alive"))
    imported: list[bool] = []

    def import_it() -> None:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            imported.append(True)

    before = signal.signal(signal.SIGTERM, stop.on_signal)
    try:
        with pytest.raises(Interrupted):
            import_it()
        import_it()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert imported == [True, True]


_TRAINS_AND_PRINTS_ITS_THREADS = """
import pathlib, sys
from zeta_core.process.launch import main
code = main(pathlib.Path(sys.argv[1]))
import torch
print("threads", torch.get_num_threads())
sys.exit(code)
"""


@pytest.mark.extended
def test_choices_of_the_first_attempt_hold_even_without_a_checkpoint(tmp_path: Path) -> None:
    resolved_spec = {"threads": 2, "mixed_precision": "bf16"}
    run_dir = make_run(tmp_path, 2, spec={"max_steps": 1}, resolved_spec=resolved_spec)
    with start(run_dir, sys.executable, "-c", _TRAINS_AND_PRINTS_ITS_THREADS) as training:
        assert training.wait(60) == 0
    running = next(line for line in journal(run_dir) if isinstance(line, StatusLine))
    assert {name: (running.resolved_spec or {})[name] for name in resolved_spec} == resolved_spec
    # The number was set before torch was imported; setting it later gives different bits.
    assert f"threads {min(2, os.cpu_count() or 1)}" in (run_dir / "train.log").read_text()


_WAITS_FOR_A_CHILD = """
import pathlib, subprocess, torch
class Model(torch.nn.Module):
    def __init__(self, file):
        super().__init__()
        self.file, self.embedding, self.head = pathlib.Path(file), torch.nn.Embedding(384, 8), torch.nn.Linear(8, 384)
    def forward(self, input_ids):
        if torch.is_grad_enabled():
            child = subprocess.Popen(["sleep", "60"])
            self.file.write_text(str(child.pid))
            raise RuntimeError(f"the child ended with {child.wait()}")
        return self.head(self.embedding(input_ids))
"""


def test_an_error_caused_by_sigterm_is_not_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = install_builder(tmp_path, monkeypatch, "waiting_model", _WAITS_FOR_A_CHILD, "Model")
    pid_file = tmp_path / "pid"

    def end_when_it_waits() -> None:
        wait_until(lambda: pid_file.exists() and pid_file.read_text(), 30, "the model's child")
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(int(pid_file.read_text()), signal.SIGTERM)

    run_dir = make_run(tmp_path, spec={"model": {"builder": builder, "arguments": {"file": str(pid_file)}}})
    ending = threading.Thread(target=end_when_it_waits)
    ending.start()
    assert run_here(run_dir) == 0
    ending.join()
    assert (end_of(run_dir).status, end_of(run_dir).reason) == ("queued", "handed_back")
    assert not [line for line in journal(run_dir) if isinstance(line, ErrorLine)]


@pytest.mark.extended
def test_the_lock_is_held_shared_while_it_runs(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, spec={"max_steps": 10_000})
    process = start(run_dir)
    wait_until(lambda: journal(run_dir), 60, "the first line")
    with (run_dir / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.kill()
    process.wait()
    with (run_dir / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("spec", "reason", "message"),
    [
        ({"dataset": {"path": "bad.jsonl"}}, "invalid_data", r"bad.jsonl, line 2 is not valid JSON"),
        ({"model": {"config": {"model_type": "nothing"}}}, "invalid_model", "not a valid nothing config"),
        ({"model": {"config": {**LLAMA_CONFIG, "vocab_size": 64}}}, "invalid_model", "embedding has 64 rows"),
        ({"model": "org/name"}, "invalid_model", "ZETA_HUB is off"),
        ({"model": {"builder": "none-such"}}, "invalid_model", "not installed here"),
        (
            {"learning_rate": 1e3, "max_grad_norm": 1e30, "optimizer": "sgd", "max_steps": 50},
            "non_finite_loss",
            "the update was not applied",
        ),
        ({"use_deepspeed": "/etc/passwd"}, "train_error", "a job can't refer to a file"),
    ],
)
def test_a_failure_has_a_reason_and_a_sentence(spec: dict[str, Any], reason: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.jsonl").write_text('{"text": "fine"}\nbroken\n')
    run_dir = make_run(tmp_path, spec=spec, data_root=str(tmp_path / "data"), hub=False)
    assert run_here(run_dir) == 1
    end = end_of(run_dir)
    assert (end.status, end.reason) == ("failed", reason)
    assert end.error is not None
    assert message in end.error.message
    assert any(isinstance(line, ErrorLine) for line in journal(run_dir))


def test_a_damaged_checkpoint_gives_a_warning_and_the_previous_one_is_used(tmp_path: Path) -> None:
    assert run_here(make_run(tmp_path, 1)) == 0
    for name in ("final", "step-6"):
        (tmp_path / "output" / name / "model.safetensors").write_bytes(b"broken")
    # After success, only the newest step has training state, so no other checkpoint can be resumed.
    resumed = make_run(tmp_path, 2, resume_from=str(tmp_path / "output"))
    assert run_here(resumed) == 1
    assert [line.code for line in journal(resumed) if isinstance(line, WarningLine)] == ["damaged_checkpoint"] * 2
    error = end_of(resumed).error
    assert error is not None
    assert error.code == "cannot_resume"


def test_a_run_that_continues_another_reports_its_own_time(tmp_path: Path) -> None:
    first, _ = train(plain, tmp_path / "first", cache=tmp_path, max_steps=4, lr_scheduler="constant")
    resumed = tmp_path / "first"
    second, _ = train(plain, tmp_path / "second", cache=tmp_path, resume=resumed, max_steps=6, lr_scheduler="constant")
    before = first.progress.train_seconds
    assert second.result.train_seconds == pytest.approx(second.progress.train_seconds - before, abs=1e-3)
    third, _ = train(plain, tmp_path / "second", cache=tmp_path, resume=True, max_steps=8, lr_scheduler="constant")
    assert third.result.train_seconds == pytest.approx(third.progress.train_seconds - before, abs=1e-3)
