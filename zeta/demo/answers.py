"""Asking models before and after the training, and showing their answers side by side.

The models run in separate processes, because the package zeta must not import torch.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from zeta.demo.museum import Question
from zeta.demo.service import DemoFailed
from zeta_core.system.settings import process_environment

ANSWER_SECONDS = 600.0
SHOWN_CHARACTERS = 240


def ask(models: Sequence[Path], questions: Sequence[Question]) -> list[list[str]]:
    """The answers of each model to the questions. The models run at the same time, each on one core."""
    variables = process_environment() | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    texts = [question.text for question in questions]
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "zeta_core", "ask", str(model), *texts],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for model in models
    ]
    try:
        return [_answers(process, model, len(questions)) for process, model in zip(processes, models, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _answers(process: subprocess.Popen[str], model: Path, number: int) -> list[str]:
    try:
        output, errors = process.communicate(timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise DemoFailed(f"{model} did not answer within {ANSWER_SECONDS:g} s.") from error
    answers = output.splitlines()
    if process.returncode != 0 or len(answers) != number:
        raise DemoFailed(f"{model} cannot be loaded or does not answer:\n{errors.strip()[-2000:]}")
    return [answer if len(answer) <= SHOWN_CHARACTERS else f"{answer[:SHOWN_CHARACTERS]} …" for answer in answers]


def num_right(questions: Sequence[Question], answers: Sequence[str]) -> int:
    """How many answers contain the expected words."""
    return sum(question.expected in answer for question, answer in zip(questions, answers, strict=True))


def show_side_by_side(questions: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> None:
    """Print a table with one row per question."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("Question", "Before the training", "After the training", show_lines=True)
    for question, *answers in zip(questions, before, after, strict=True):
        table.add_row(*(Text(text) for text in (question.text, *answers)))
    Console().print(table)
