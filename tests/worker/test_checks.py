"""Checks that a worker runs for the server: each ends with an answer, whatever the program does."""

import sys
from pathlib import Path

from tests.harness.waiting import wait_until
from worker.checks import Checks
from worker.settings import WorkerSettings
from zeta_core.contract.messages import CheckRequest, CheckResult

# Speaks the language of `python -m zeta_core check -`, without torch.
PROGRAM = """
import json, os, sys, threading
order = json.load(sys.stdin)
assert sys.argv[1:] == ["check", "-"]
assert not [name for name in os.environ if name.startswith("ZETA_") and name not in ("ZETA_JOB_ID", "ZETA_ATTEMPT")]
match order["spec"]["does"]:
    case "answer":
        print(json.dumps({"ok": True, "num_parameters": order["resolved_spec"]["number"]}))
    case "break":
        sys.exit(3)
    case "hang":
        threading.Event().wait(600)
"""


def test_a_check_ends_with_an_answer_a_failure_or_its_limit(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    settings = WorkerSettings(home=tmp_path / "home", worker_secret="s", worker_name="w")
    said: dict[str, CheckResult] = {}
    checks = Checks(settings, (sys.executable, str(program)), lambda result: said.update({result.check_id: result}))
    for does in ("answer", "answer", "break", "hang"):
        checks.take(CheckRequest(check_id=does, spec={"does": does}, resolved_spec={"number": 5}, limit_seconds=2))
    for number in range(4):
        checks.take(CheckRequest(check_id=f"more {number}", spec={"does": "answer"}, resolved_spec={}, limit_seconds=2))
    assert any("checks to do already" in (result.failure or "") for result in said.values())
    wait_until(lambda: said.keys() >= {"answer", "break", "hang"}, 30, "every answer")
    checks.stop()
    answer = said["answer"].answer
    assert answer is not None
    assert answer.num_parameters == 5
    assert "without an answer" in (said["break"].failure or "")
    assert "longer than 2 s" in (said["hang"].failure or "")
