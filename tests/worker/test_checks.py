"""Checks that a worker runs for the server: each ends with an answer, whatever the program does."""

import sys
from pathlib import Path

import psutil

from tests.harness.waiting import wait_until
from worker.checks.answer import Checks
from worker.machine.devices import Slot
from worker.settings import WorkerSettings
from zeta_core.contract.messages import CheckRequest, CheckResult

# Speaks the language of `python -m zeta_core checks`, without torch.
PROGRAM = """
import json, os, sys, threading
assert sys.argv[1:] == ["checks"]
assert not [name for name in os.environ if name.startswith("ZETA_") and name not in ("ZETA_JOB_ID", "ZETA_ATTEMPT")]
for line in sys.stdin:
    order = json.load(open(line.strip()))
    assert (order["device"], order["supports_bf16"]) == ("cuda", True), "of what it would get, seen or not"
    match order["spec"]["does"]:
        case "answer" | "answer and leave":
            print(json.dumps({"ok": True, "num_parameters": order["resolved_spec"]["number"], "tokens": os.getpid()}))
        case "break":
            sys.exit("broken")
        case "hang":
            threading.Event().wait(600)
    if order["spec"]["does"] == "answer and leave":
        break
"""


def test_a_check_ends_with_an_answer_a_failure_or_its_limit(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    settings = WorkerSettings(home=tmp_path / "home", worker_secret="s", worker_name="w")
    said: dict[str, CheckResult] = {}
    command, gpu = (sys.executable, str(program)), Slot(0, "cuda", "a GPU", 1, "0", supports_bf16=True)
    checks = Checks(settings, command, [gpu], lambda result: said.update({result.check_id: result}))

    def take(name: str, does: str) -> None:
        limit = 2 if does == "hang" else 60
        checks.take(CheckRequest(check_id=name, spec={"does": does}, resolved_spec={"number": 5}, limit_seconds=limit))

    def process_of(name: str) -> int:
        answer = said[name].answer
        assert answer is not None, said[name].failure
        assert answer.num_parameters == 5
        assert answer.tokens is not None
        return answer.tokens

    for name, does in (("first", "answer"), ("first", "answer"), ("second", "answer and leave"), ("third", "answer")):
        take(name, does)
    wait_until(lambda: said.keys() >= {"first", "second", "third"}, 60, "every answer")
    assert process_of("first") == process_of("second") != process_of("third"), "one that has ended is started anew"
    for does in ("break", "hang", "answer", "answer and leave"):
        take(does, does)
    for number in range(4):
        take(f"more {number}", "answer")
    assert any("checks to do already" in (result.failure or "") for result in said.values())
    wait_until(lambda: said.keys() >= {"break", "hang", "answer and leave"}, 60, "every answer")
    assert "last words were: broken" in (said["break"].failure or "")
    assert "longer than 2 s" in (said["hang"].failure or "")
    assert process_of("answer") == process_of("answer and leave") != process_of("third")
    take("last", "answer")
    wait_until(lambda: "last" in said, 30, "its answer")
    checks.stop()
    wait_until(lambda: not psutil.pid_exists(process_of("last")), 30, "the process to be gone")
