"""Runs that train on conversations, and the settings that apply only to them."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.zeta_core.data.chat_templates import SMOLLM3
from tests.zeta_core.models import llama
from tests.zeta_core.runs import train
from zeta_core.contract.job.events import WarningLine
from zeta_core.failures import CannotTrain, InvalidData
from zeta_core.run.inputs import LARGE_DATA_BYTES

QUESTION = {"role": "user", "content": "What ends a text? </s>?"}
ANSWER = {"role": "assistant", "content": "It does."}


def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows: list[Any] = [[QUESTION, ANSWER]] * 7 + [[QUESTION, ANSWER, {"role": "user", "content": "Thanks."}]]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def test_a_template_with_a_date_is_trained_on_saved_and_resumed_on_another_day(tmp_path: Path) -> None:
    data = {"path": str(chats(tmp_path))}
    options: dict[str, Any] = {"dataset": data, "chat_template": SMOLLM3, "seq_len": 256, "cache": tmp_path / "cache"}
    first, lines = train(llama(), tmp_path / "out", max_steps=2, started_on=date(2026, 1, 2), **options)
    assert lines.resolved_spec["template_date"] == "2026-01-02"
    assert lines.resolved_spec["data_report"]["control_tokens"] == 8
    warned = {line.code: line.message for line in lines.all if isinstance(line, WarningLine)}
    assert "8 control tokens, the first one in chats.jsonl, line 1" in warned["control_tokens_in_text"]
    assert warned["turns_not_used"].startswith("1 conversation continues")
    assert first.checkpoint is not None
    assert (first.checkpoint / "chat_template.jinja").read_text() == SMOLLM3
    later, _ = train(llama(), tmp_path / "out", resume=True, max_steps=3, started_on=date(2026, 3, 4), **options)
    assert later.steps_trained == 1


def test_a_template_for_data_without_conversations_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Some words. " * 100)
    with pytest.raises(CannotTrain, match="chat_template is set, but the data contains no conversations"):
        train(
            llama(),
            tmp_path / "out",
            cache=tmp_path / "cache",
            dataset={"path": str(tmp_path / "a.txt")},
            chat_template="{{ messages }}",
            max_steps=1,
        )


def test_large_data_is_checked_before_it_is_tokenized(tmp_path: Path) -> None:
    row = json.dumps({"messages": [QUESTION, {**ANSWER, "content": "It does. " * 5000}]}) + "\n"
    path = tmp_path / "large.jsonl"
    path.write_text(row * (1 + LARGE_DATA_BYTES // len(row)) + json.dumps({"messages": [QUESTION]}) + "\n")
    with pytest.raises(InvalidData, match="has no assistant turn to train on"):
        train(llama(), tmp_path / "out", cache=tmp_path / "cache", dataset={"path": str(path)}, max_steps=1)
    assert [entry.name.partition("-")[0] for entry in (tmp_path / "cache").iterdir()] == ["rows"]
