"""``python -m zeta_core ask`` prints a model's answers."""

import io
from pathlib import Path
from typing import Any

import pytest

from tests.zeta_core.data.chat_templates import CHATML, byte_tokenizer
from tests.zeta_core.models import llama
from zeta_core import ask


@pytest.fixture(params=[CHATML, None], ids=["chat", "text"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A small untrained model, with or without a chat template."""
    built: Any = llama()
    built.save_pretrained(tmp_path)
    byte_tokenizer(request.param).save_pretrained(tmp_path)
    return str(tmp_path)


def test_every_question_gets_one_line_and_the_same_answer(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask.main(model, ["Which river?", "Who?"]) == 0
    given = capsys.readouterr().out
    assert given.count("\n") == 2
    assert given.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO("Which river?\n\nWho?\n"))
    assert ask.main(model, []) == 0
    assert capsys.readouterr().out == given


def test_a_folder_without_a_model_gets_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.main(str(tmp_path), ["Who?"]) == 1
    printed = capsys.readouterr()
    assert (printed.out, str(tmp_path) in printed.err) == ("", True)
