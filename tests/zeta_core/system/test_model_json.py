"""The JSON files of a model are parsed strictly, with limits on size and depth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness.model_archives import CONFIG, model_files
from tests.harness.model_checks import cleaned_files, rejection
from zeta_core.system.model_files import FolderFiles, InvalidModelFiles, clean_files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a":' * 100 + b"1" + b"}" * 100, "is nested more than 64 levels deep"),
        (b'{"a":' * 100_000, "is nested more than 64 levels deep"),
        (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "is nested more than 64 levels deep"),
        (b"not JSON", "is not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 or UTF-32 text"),
        ("\ufeff{}".encode(), "starts with a byte order mark; encode it as UTF-8 without one"),
        (b'{"a": "\xe9"}', "is not UTF-8 text (byte 0xe9 in line 1)"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "contains 'c' twice in one object; keep one of them"),
        (b'{"a": [' + b"0," * 8_000_001 + b"0]}", "has too many values"),
        (b'{"a": [' + b"[]," * 2_000_001 + b"0]}", "has too many values"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not valid JSON"),
        (b" " * (65 << 20), "has 68157440 bytes"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "any.json"])
def test_malformed_or_oversized_json_is_rejected(tmp_path: Path, file: str, content: bytes, expected: str) -> None:
    message = rejection(tmp_path, {**model_files(), file: content})
    assert message.startswith(f"model.tar: {file} ")
    assert expected in message, message


def test_a_lone_surrogate_is_rejected_with_its_field(tmp_path: Path) -> None:
    message = rejection(tmp_path, {**model_files(), "config.json": b'{"model_type": "llama", "a": ["\\ud83d"]}'})
    assert message == "model.tar: config.json: a.0 contains the lone surrogate U+D83D; remove it."


def test_control_characters_and_infinite_numbers_are_kept(tmp_path: Path) -> None:
    content = b'{"model_type": "mamba2", "time_step_limit": [0.0, Infinity], "note": "\\u001b \\ud83d\\ude00"}'
    seen = cleaned_files(tmp_path, {"config.json": content})["config.json"]
    assert seen == {"model_type": "mamba2", "time_step_limit": [0.0, float("inf")], "note": "\x1b \U0001f600"}


def test_a_duplicate_control_character_is_shown_escaped(tmp_path: Path) -> None:
    content = b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"\\u001b": 1, "\\u001b": 2}}}'
    message = rejection(tmp_path, {**model_files(), "tokenizer.json": content})
    assert message == r"model.tar: tokenizer.json contains '\x1b' twice in one object; keep one of them."


def test_published_models_may_have_duplicate_names_in_rewritten_files(tmp_path: Path) -> None:
    duplicate = json.dumps(CONFIG).replace('"vocab_size"', '"vocab_size": 1, "vocab_size"')
    (tmp_path / "config.json").write_text(duplicate)
    (tmp_path / "results.json").write_text('{"step": 1, "step": 2}')
    files = FolderFiles(tmp_path, "org/name")
    (found,) = clean_files(files, ".", "external", weights=True)
    assert json.loads(found[1] or b"") == CONFIG
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": "../x"}, "model": {"type": "BPE", "vocab": {}}}')
    with pytest.raises(InvalidModelFiles, match=r"tokenizer\.json contains 'model' twice in one object"):
        list(clean_files(FolderFiles(tmp_path, "org/name"), ".", "external", weights=True))
