"""`zeta data show`: rows token by token, printed by the command with the training packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Why\x1b[31m?"}, {"role": "assistant", "content": "So."}],
    "id": 7,
}


def show(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zeta", "data", "show", *words],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=folder,
        env={**os.environ, "ZETA_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"},  # noqa: TID251 - a child's
        check=False,
    )


def written(folder: Path, *rows: dict[str, Any], name: str = "data.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def rows_of(folder: Path, *words: str) -> list[dict[str, Any]]:
    done = show(folder, *words, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)["data"]


def texts(document: dict[str, Any], *, trained: bool) -> str:
    return "".join(token["text"] for token in document["tokens"] if token["trained"] == trained)


def test_a_conversation_is_printed_with_what_is_trained_on_cut_off_and_unused(tmp_path: Path) -> None:
    written(tmp_path, CHAT, {"messages": [*CHAT["messages"][:1], {"role": "assistant", "content": ""}]})
    whole = show(tmp_path, "data.jsonl", "--rows", "1")
    assert whole.returncode == 0, whole.stderr
    lines = whole.stdout.splitlines()
    assert "data.jsonl, line 1: format messages" in lines
    assert "    W│h│y│\\x1b│[│3│1│m│?│<│|│i│m│_│e│n│d│|│>│\\n" in [line.replace("u│s│e│r│\\n", "") for line in lines]
    assert any(line.startswith("  + S│o│.│<│|│i│m│_│e│n│d│|│>") for line in lines)
    assert "  columns not used: id" in lines
    assert "\x1b" not in whole.stdout, "there is no colour in a pipe, and control characters are escaped"

    cut = show(tmp_path, "data.jsonl", "--set", "seq_len=64")
    assert cut.returncode == 1, "the second row is rejected"
    total = len("<|im_start|>user\nWhy\x1b[31m?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n")
    assert f"  {total} tokens, " in cut.stdout
    assert f", {total - 64} cut off" in cut.stdout
    assert "  x " in cut.stdout
    assert "data.jsonl, line 2 is rejected." in cut.stdout
    assert "has an empty assistant turn" in cut.stdout


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ({"prompt": "Two and two:", "completion": " four"}, [], [("Two and two:", " four</s>")]),
        ({"text": "Once."}, [], [("O", "nce.</s>")]),
        ({"input_ids": [68, 69, 70], "labels": [-100, -100, 70]}, ["use_pretokenized=true"], [("AB", "C")]),
        (
            {"prompt": "Two?", "chosen": " 2", "rejected": " 3"},
            [],
            [("Two?", " 2</s>"), ("Two?", " 3</s>")],
        ),
        ({"q": "Two?", "a": " é"}, ["dataset.columns={prompt: q, completion: a}"], [("Two?", " <198>é</s>")]),
    ],
    ids=["completion", "text", "ids", "preference", "columns"],
)
def test_every_format_is_shown(
    tmp_path: Path, row: dict[str, Any], settings: list[str], expected: list[tuple[str, str]]
) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    (shown,) = rows_of(tmp_path, written(tmp_path, row), *words)
    found = [(texts(one, trained=False), texts(one, trained=True)) for one in shown["documents"]]
    assert found == expected


def test_a_spec_names_the_data_and_options_change_it(tmp_path: Path) -> None:
    written(tmp_path, *({"text": f"Text {number}."} for number in range(1, 40)))
    spec = {"model": {"config": {"model_type": "llama"}}, "dataset": {"file": "data.jsonl"}, "seq_len": 16}
    (tmp_path / "job.json").write_text(json.dumps({**spec, "entity_name": "shown"}))
    done = show(tmp_path, "job.json", "--row", "37", "--set", "seq_len=8", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["seq_len"] == 8
    (row,) = found["data"]
    assert row["place"] == "data.jsonl, line 37"
    assert texts(row["documents"][0], trained=True) == "ext 37."
    assert row["documents"][0]["num_tokens"] == len("Text 37.") + 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.jsonl", "--row", "9"], "The dataset has no row 9."),
        (["none.jsonl"], "there is no such file or folder here"),
        (["file_00000000000000000001"], "an uploaded file; name the local file"),
        (["data.jsonl", "--set", "train_om=all"], "train_on"),
        (["data.jsonl", "--set", "train_on=assistant"], "is plain text without turns"),
    ],
    ids=["row", "file", "uploaded", "field", "train_on"],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, words: list[str], message: str) -> None:
    written(tmp_path, {"text": "One."})
    done = show(tmp_path, *words)
    assert done.returncode in (1, 2)
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
