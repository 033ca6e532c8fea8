"""Checks that a worker runs for the server: each one gets a result, whatever its process does."""

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness.waiting import wait_until
from tests.zeta_core.models import LLAMA_CONFIG
from tests.zeta_core.run_directories import ROOT, SPEC
from worker.checks.process import CheckFailed, CheckProcess
from worker.checks.runner import SpecCheckRunner
from worker.machine.devices import Slot
from worker.machine.gpus import Gpu
from worker.settings import WorkerSettings
from zeta_core.contract.job.check import CheckAnswer
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.wire.messages import CheckRequest, CheckResult
from zeta_core.system.artifact_store.folder import FolderStore

RESOLVED = ResolvedSpec.model_validate({"number": 5})

# Follows the protocol of `python -m zeta_core checks`, without torch.
PROGRAM = """
import json, os, signal, sys, threading
assert sys.argv[1:] == ["checks"]
assert not [name for name in os.environ if name.startswith("ZETA_") and name not in ("ZETA_JOB_ID", "ZETA_ATTEMPT")]
for line in sys.stdin:
    run_file = json.load(open(line.strip()))
    assert (run_file["device"], run_file["supports_bf16"]) == ("cuda", True), "the requested GPU, visible here or not"
    match run_file["spec"]["does"]:
        case "answer" | "answer and leave":
            number = run_file["resolved_spec"]["number"]
            print(json.dumps({"ok": True, "num_parameters": number, "tokens": os.getpid()}))
        case "break":
            sys.exit("broken")
        case "hang":
            threading.Event().wait(600)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "allocate":
            try:
                bytearray(1 << 31)
            except MemoryError:
                sys.exit(12)
        case "abort":
            print("memory allocation of 4294967296 bytes failed", file=sys.stderr, flush=True)
            os.abort()
        case "write":
            try:
                os.truncate(os.open("large", os.O_RDWR | os.O_CREAT | os.O_TRUNC), 1 << 40)
            except OSError as error:
                sys.exit(f"file too large: {error.errno}")
        case "flood":
            while True:
                sys.stdout.write("a" * (1 << 20))
    if run_file["spec"]["does"] == "answer and leave":
        break
"""


def run_checks(tmp_path: Path, gpu: Slot | None = None) -> tuple[SpecCheckRunner, dict[str, CheckResult]]:
    """The checks of a worker that run `PROGRAM`, for ``gpu`` or the CPU, and their results by id."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM if gpu is not None else PROGRAM.replace('"cuda", True', '"cpu", False'))
    settings = WorkerSettings(home=tmp_path / "home", worker_secret="s", worker_name="w")
    results: dict[str, CheckResult] = {}

    def receive(result: CheckResult) -> None:
        results[result.check_id] = result

    slots = [] if gpu is None else [gpu]
    store = FolderStore(settings.artifacts)
    return SpecCheckRunner(settings, (sys.executable, str(program)), slots, receive, store), results


def test_a_check_ends_with_an_answer_a_failure_or_its_limit(tmp_path: Path) -> None:
    gpu = Slot(0, "cuda", "a GPU", 1, Gpu("0", "GPU-1", "a GPU", 1, (9, 0)), supports_bf16=True)
    checks, results = run_checks(tmp_path, gpu)

    def take(name: str, does: str) -> None:
        limit = 2 if does == "hang" else 60
        checks.take(CheckRequest(check_id=name, spec={"does": does}, resolved_spec=RESOLVED, limit_seconds=limit))

    def process_of(name: str) -> int:
        answer = results[name].answer
        assert answer is not None, results[name].failure
        assert answer.num_parameters == 5
        assert answer.tokens is not None
        return answer.tokens

    for name, does in (("first", "answer"), ("first", "answer"), ("second", "answer and leave"), ("third", "answer")):
        take(name, does)
    wait_until(lambda: results.keys() >= {"first", "second", "third"}, 60, "every result")
    assert process_of("first") == process_of("second") != process_of("third"), "a process that has exited is replaced"
    for does in ("break", "hang", "answer", "answer and leave"):
        take(does, does)
    for number in range(4):
        take(f"more {number}", "answer")
    assert any("checks of this project queued" in (result.failure or "") for result in results.values())
    wait_until(lambda: results.keys() >= {"break", "hang", "answer and leave"}, 60, "every result")
    assert "(exit code 1); its last output was: broken" in (results["break"].failure or "")
    assert "exceeded its limit of 2 s and was ended; a larger ZETA_CHECK_SECONDS" in (results["hang"].failure or "")
    assert process_of("answer") == process_of("answer and leave") != process_of("third")
    take("last", "answer")
    wait_until(lambda: "last" in results, 30, "the result")
    checks.stop()
    wait_until(lambda: not psutil.pid_exists(process_of("last")), 30, "the process to exit")


def test_slow_checks_of_one_project_do_not_delay_those_of_another(tmp_path: Path) -> None:
    checks, results = run_checks(tmp_path)

    def take(project: str, name: str, does: str, limit_seconds: float) -> None:
        request = CheckRequest(
            check_id=name, project=project, spec={"does": does}, resolved_spec=RESOLVED, limit_seconds=limit_seconds
        )
        checks.take(request)

    for number in range(5):
        take("slow", f"slow {number}", "hang", 1000)
    take("quick", "quick", "answer", 60)
    wait_until(lambda: "quick" in results, 10, "the other project's check")
    assert results["quick"].answer is not None
    assert not [name for name in results if name.startswith("slow")], "the slow checks wait or run"
    take("slow", "one more", "answer", 60)
    assert "already has 4 checks of this project queued" in (results["one more"].failure or "")
    checks.stop()


@pytest.mark.extended
def test_a_slow_check_starts_another_process_before_a_project_needs_it(tmp_path: Path) -> None:
    checks, results = run_checks(tmp_path)
    before = set(psutil.Process().children())
    checks.take(CheckRequest(check_id="a", project="a", spec={"does": "hang"}, resolved_spec=RESOLVED, limit_seconds=9))
    wait_until(lambda: len(set(psutil.Process().children()) - before) == 2, 8, "the second process")
    warm = set(psutil.Process().children()) - before
    checks.take(
        CheckRequest(check_id="b", project="b", spec={"does": "answer"}, resolved_spec=RESOLVED, limit_seconds=60)
    )
    wait_until(lambda: results.keys() == {"a", "b"}, 60, "both results")
    assert set(psutil.Process().children()) & warm, "the process that has answered is kept for the next check"
    checks.stop()
    wait_until(lambda: not set(psutil.Process().children()) - before, 30, "the processes to exit")


def test_a_check_that_nobody_waits_for_yields_to_other_projects(tmp_path: Path) -> None:
    checks, results = run_checks(tmp_path)
    for project, does in (("first", "hang"), ("second", "hang"), ("third", "answer")):
        checks.take(
            CheckRequest(
                check_id=project, project=project, spec={"does": does}, resolved_spec=RESOLVED, limit_seconds=8
            )
        )
    wait_until(lambda: "third" in results, 20, "the check that waits")
    assert results["third"].answer is not None
    failures = [result.failure or "" for result in results.values() if result.answer is None]
    assert "because checks of other projects were waiting" in failures[0]
    checks.stop()


def test_every_check_that_cannot_be_run_gets_a_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checks, results = run_checks(tmp_path)

    def result(check: str, **fields: Any) -> CheckResult:
        spec = {"does": "answer", **fields}
        checks.take(CheckRequest(check_id=check, spec=spec, resolved_spec=RESOLVED, limit_seconds=60))
        wait_until(lambda: check in results, 60, "the result")
        return results[check]

    assert result("fields of a newer server", resources={"gpus": 1, "future_field": 3}).failure is None
    assert result("resources of another type", resources=[1]).failure is None
    assert "could not be run" in (result("text that is not UTF-8", name="\ud800").failure or "")
    assert "Traceback" in caplog.text, "the log names the cause"
    assert result("the next one").failure is None
    checks.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="process limits need Linux")
def test_a_check_that_exceeds_a_limit_names_it_and_the_next_one_works(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONUNBUFFERED": "1"}
    process = CheckProcess((sys.executable, str(program)), environment, tmp_path, memory_bytes=1 << 30)

    def check(does: str) -> bytes:
        run_file = {"device": "cuda", "supports_bf16": True, "spec": {"does": does}, "resolved_spec": {"number": 5}}
        (tmp_path / "run.json").write_text(json.dumps(run_file))
        return process.check(tmp_path / "run.json", limit_seconds=60)

    for does, message in (
        ("allocate", "exceeded its limit of 1,024 MiB of memory and was ended; a larger ZETA_CHECK_MEMORY_BYTES"),
        ("abort", "exceeded its limit of 1,024 MiB of memory"),
        ("crash", "crashed with SIGSEGV"),
        ("flood", "answer exceeded 4 MiB"),
        ("write", "file too large: 27"),
    ):
        with pytest.raises(CheckFailed, match=message):
            check(does)
        assert json.loads(check("answer"))["num_parameters"] == 5, f"after {does}"
    process.end()


@pytest.mark.extended
@pytest.mark.skipif(sys.platform != "linux", reason="process limits need Linux")
def test_a_model_that_takes_too_much_memory_to_check_is_reported(tmp_path: Path) -> None:
    """Uses the real program: the config creates a name for each of its labels."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    process = CheckProcess((sys.executable, "-m", "zeta_core"), environment, tmp_path, memory_bytes=1 << 30)
    for labels, message in ((10**8, "exceeded its limit of 1,024 MiB of memory"), (2, None)):
        spec = {**SPEC, "model": {"config": {**LLAMA_CONFIG, "num_labels": labels}}}
        (tmp_path / "run.json").write_text(json.dumps({"spec": spec}))
        if message is None:
            answer = CheckAnswer.model_validate_json(process.check(tmp_path / "run.json", limit_seconds=120))
            assert answer.ok, answer.details
        else:
            with pytest.raises(CheckFailed, match=message):
                process.check(tmp_path / "run.json", limit_seconds=300)
    process.end()
