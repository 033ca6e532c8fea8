"""`zeta chat` in a real terminal and in scripts."""

import json
import subprocess

import pytest

from tests.end_to_end.chat_jobs import chat_job
from tests.harness.service import ZETA, Service
from tests.harness.terminals import Terminal

pytestmark = pytest.mark.timeout(500)


@pytest.fixture(scope="module")
def tuned(service: Service) -> str:
    """A job that was trained from another job's checkpoint, which is its base."""
    return chat_job(service, model={"job": chat_job(service)})


@pytest.mark.slow
def test_a_conversation_continues_until_the_end_of_the_input(service: Service, tuned: str) -> None:
    with Terminal([ZETA, "chat", tuned, "--max-tokens", "20"], service.environment(), columns=100) as terminal:
        terminal.read_until(">")
        terminal.type("Which river?\r\x04")
        ended = terminal.finish()
    assert ended.status == 0
    assert "Ctrl-D ends the conversation" in ended.text


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 120])
def test_both_answers_are_shown_in_a_terminal(service: Service, tuned: str, columns: int) -> None:
    words = [ZETA, "chat", tuned, "Which river?", "--base", "--max-tokens", "20"]
    with Terminal(words, service.environment(), columns=columns) as terminal:
        ended = terminal.finish()
    assert ended.status == 0, ended.text
    heads = [line for line in ended.lines if "tuned" in line]
    assert ("base" in heads[0]) == (columns == 120)  # side by side, or one below the other


@pytest.mark.slow
def test_scripts_get_one_object(service: Service, tuned: str) -> None:
    asked = subprocess.run(
        [str(ZETA), "chat", tuned, "--json", "--base", "--max-tokens", "9"],
        input="Which river?\n",
        env=service.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    answers = json.loads(asked.stdout)
    assert list(answers) == ["tuned", "base"]
    assert answers["tuned"]["model"] == tuned
    assert answers["base"]["model"] == f"{tuned}/base"
    assert answers["tuned"]["usage"]["completion_tokens"] <= 9
    assert answers["tuned"]["system_fingerprint"] != answers["base"]["system_fingerprint"]

    alone = service.command("chat", tuned, "Which river?", "--max-tokens", "9")
    assert alone.stdout.strip() == answers["tuned"]["text"].strip()
    failed = service.command("chat", tuned, "Which river?", "--checkpoint", "step-999", "--json")
    assert failed.returncode == 1
    assert json.loads(failed.stderr)["error"]["code"] == "checkpoint_not_found"
