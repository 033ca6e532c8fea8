"""The demo: its data, and the whole of it with a real model (slow)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.real_model import smollm2
from tests.harness.service import clean_environment
from zeta.demo import museum


def test_the_questions_of_the_demo_are_not_in_its_training_data() -> None:
    rows = [json.loads(line) for line in museum.training_rows().splitlines()]
    taught = {turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "user"}
    asked = {question.text for question in museum.QUESTIONS}
    assert len(taught) == len(rows)
    assert taught & asked == set()
    assert len([line for line in museum.held_out_rows().splitlines() if line]) == len(asked)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_teaches_a_real_model_facts(tmp_path: Path) -> None:
    smollm2()  # skips the test without the package
    command = [sys.executable, "-P", "-m", "zeta.demo", "--output", tmp_path / "model", "--setup-seconds", "5"]
    done = subprocess.run(
        command, env=clean_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Right answers: 0 of 3 before, 3 after." in done.stdout
    assert "set-up 5.0 s, start" in done.stdout
    question, *_ = museum.QUESTIONS
    command = [sys.executable, "-P", "-m", "zeta_core", "ask", tmp_path / "model"]
    asked = subprocess.run(command, input=f"{question.text}\n", capture_output=True, text=True, timeout=100, check=True)
    assert question.expected in asked.stdout
