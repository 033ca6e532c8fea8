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


def show(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ZETA_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}  # noqa: TID251 - a child's
    return subprocess.run(
        [sys.executable, "-m", "zeta", "data", "show", *words],
        capture_output=True,
        encoding=variables.get("PYTHONIOENCODING", "utf-8"),
        errors="replace",
        timeout=200,
        cwd=folder,
        env={**environment, **variables},
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


def test_a_conversation_is_printed_with_its_trained_and_cut_off_tokens(tmp_path: Path) -> None:
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
        pytest.param({"text": "Once."}, [], [("O", "nce.</s>")], marks=pytest.mark.extended),
        pytest.param(
            {"input_ids": [68, 69, 70], "labels": [-100, -100, 70]},
            ["use_pretokenized=true"],
            [("AB", "C")],
            marks=pytest.mark.extended,
        ),
        pytest.param(
            {"prompt": "Two?", "chosen": " 2", "rejected": " 3"},
            ["method=dpo"],
            [("Two?", " 2</s>"), ("Two?", " 3</s>")],
            marks=pytest.mark.extended,
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
    found = [(texts(document, trained=False), texts(document, trained=True)) for document in shown["documents"]]
    assert found == expected


@pytest.mark.extended
def test_a_spec_names_the_data_and_options_override_it(tmp_path: Path) -> None:
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
        (["file_00000000000000000001"], "an uploaded file; name the local file with --set dataset=FILE"),
        (["~nouser/x.jsonl"], "~nouser/x.jsonl names the home directory of a user that does not exist here"),
        (["data.jsonl", "--model", "~nouser/m"], "~nouser/m names the home directory"),
        (["data.jsonl", "--model", "./m"], "model is './m', but there is no such file or folder here."),
        (["data.jsonl", "--model", "broken.json"], "model: broken.json is not valid JSON"),
        (["data.jsonl", "--model", "twice.json"], "model: twice.json contains 'model_type' twice"),
        (["twice-spec.json"], "twice-spec.json contains 'seq_len' twice"),
        (["deep.json"], "deep.json, line 1 is not valid JSON (it is nested too deeply)"),
        (["data.jsonl", "--model", "@last"], "run `zeta download @last -o DIR`, then use --model DIR"),
        (["data.jsonl", "--model", "job_01kb/step-4"], "run `zeta download job_01kb -o DIR`, then use --model DIR"),
        (["job.json"], "run `zeta download job_00000000000000000001 -o DIR`, then use --model DIR"),
        (["data.jsonl", "--set", "train_om=all"], "'train_om' is not a known field; did you mean 'train_on'?"),
        (["data.jsonl", "--set", "train_on=assistant"], "is plain text without turns"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_a_mistake_is_reported_in_one_sentence(tmp_path: Path, words: list[str], message: str) -> None:
    written(tmp_path, {"text": "One."})
    (tmp_path / "broken.json").write_text('{"model_type": ')
    (tmp_path / "twice.json").write_text('{"model_type": "llama", "model_type": "gpt2"}')
    (tmp_path / "twice-spec.json").write_text('{"dataset": "data.jsonl", "seq_len": 8, "seq_len": 16}')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    written(tmp_path, {"dataset": "data.jsonl", "model": {"job": "job_00000000000000000001"}}, name="job.json")
    done = show(tmp_path, *words)
    is_in_data = words in (["deep.json"], ["data.jsonl", "--set", "train_on=assistant"])
    assert done.returncode == (1 if is_in_data else 2)
    assert "bug in zeta" not in done.stderr
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.extended
@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["latin-1", "C"],
)
def test_rows_are_shown_in_every_locale(tmp_path: Path, variables: dict[str, str]) -> None:
    model = tmp_path / "é.json"
    model.write_text('{"model_type": "llama"}')
    (tmp_path / "data.jsonl").write_text('{"prompt": "é 中", "completion": "ñ"}\n', encoding="utf-8")
    done = show(tmp_path, "data.jsonl", "--json", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (document,) = json.loads(done.stdout)["data"][0]["documents"]
    assert texts(document, trained=False) == "<198>é <231><187>中"
    in_words = show(tmp_path, "data.jsonl", **variables)
    assert in_words.returncode == 0, in_words.stdout + in_words.stderr
    assert "9 tokens, 3 trained on" in in_words.stdout


@pytest.mark.extended
def test_a_text_longer_than_seq_len_continues_in_further_sequences(tmp_path: Path) -> None:
    written(tmp_path, {"text": "a" * 18})
    done = show(tmp_path, "data.jsonl", "--set", "seq_len=8")
    assert "  19 tokens, 18 trained on\n" in done.stdout
    assert "(11 more tokens, in further sequences)" in done.stdout
    truncated = show(tmp_path, "data.jsonl", "--set", "seq_len=8", "--set", "overlong=truncate")
    assert "  19 tokens, 7 trained on, 11 cut off\n" in truncated.stdout
    assert "further sequences" not in truncated.stdout
    dropped = show(tmp_path, "data.jsonl", "--set", "seq_len=8", "--set", "overlong=drop")
    assert "so a run drops it" in dropped.stdout
    rejected = show(tmp_path, "data.jsonl", "--set", "seq_len=8", "--set", "overlong=error")
    assert rejected.returncode == 1
    assert "data.jsonl, line 1 has 19 tokens, more than the 8 of seq_len." in rejected.stdout


@pytest.mark.extended
def test_a_text_file_is_shown_as_one_document(tmp_path: Path) -> None:
    text = "One line of the text.\n" * 40_000
    (tmp_path / "book.txt").write_text(text)
    done = show(tmp_path, "book.txt", "--set", "seq_len=64")
    assert done.stdout.count("book.txt: format text\n") == 1
    assert f"  {len(text) + 1:,} tokens, {len(text):,} trained on\n" in done.stdout
    assert f"({len(text) + 1 - 64:,} more tokens, in further sequences)" in done.stdout
    (tmp_path / "book.txt").write_text(text * 6)
    beginning = show(tmp_path, "book.txt", "--set", "seq_len=64")
    assert beginning.stdout.count("format text") == 1
    assert "Only the beginning of the document is shown and counted: the first 4 MiB." in beginning.stdout


@pytest.mark.extended
@pytest.mark.parametrize(
    ("row", "settings"),
    [
        (CHAT, []),
        ({"prompt": "A" * 60, "completion": "B"}, []),
        ({"prompt": "A", "chosen": "B" * 4, "rejected": "A" * 60}, ["--set", "method=dpo"]),
        ({"input_ids": list(range(5, 55)), "labels": [-100] * 49 + [54]}, ["--set", "use_pretokenized=true"]),
    ],
    ids=["messages", "completion", "preference", "ids"],
)
def test_a_row_without_trained_tokens_in_seq_len_is_noted(
    tmp_path: Path, row: dict[str, Any], settings: list[str]
) -> None:
    note = "  note: nothing is trained on within seq_len, so a run drops this row; raise seq_len\n"
    written(tmp_path, row)
    is_cut_before_the_answer = "chosen" not in row
    short = show(tmp_path, "data.jsonl", "--set", "seq_len=32", *settings)
    assert short.returncode == 0, short.stdout + short.stderr
    assert (note in short.stdout) == is_cut_before_the_answer, short.stdout
    assert note not in show(tmp_path, "data.jsonl", "--set", "seq_len=128", *settings).stdout


@pytest.mark.extended
def test_preferences_need_the_method_that_trains_on_them(tmp_path: Path) -> None:
    written(tmp_path, {"prompt": "Two?", "chosen": " 2", "rejected": " 3"})
    done = show(tmp_path, "data.jsonl")
    assert done.returncode == 1
    assert "The data has preference rows, which method 'sft' does not support" in done.stderr
    assert "--set method=dpo" in done.stderr
    wrong = show(tmp_path, written(tmp_path, {"text": "a"}, name="text.jsonl"), "--set", "method=dpo")
    assert (wrong.returncode, "--set method=dpo" in wrong.stderr) == (1, False)


def test_output_of_libraries_does_not_corrupt_the_result(tmp_path: Path) -> None:
    request = {"spec": {"dataset": {"path": str(tmp_path / written(tmp_path, {"text": "One."}))}}}
    program = (
        "import os, sys; import zeta_core.dry_run.show as show\n"
        "real = show.make_encoder\n"
        "def noisy(*given, **more):\n"
        "    print('hello'); os.system('echo from a child'); return real(*given, **more)\n"
        "show.make_encoder = noisy\n"
        "sys.exit(show.main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["object"] == "shown_rows"
    assert "hello" in done.stderr
