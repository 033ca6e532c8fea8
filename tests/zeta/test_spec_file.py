"""Reading spec files in YAML and JSON, and applying --set options."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zeta.spec_file import apply_settings, looks_like_data, read_spec
from zeta_core.contract.errors import InvalidRequest


def yaml_file(folder: Path, text: str) -> Path:
    file = folder / "job.yaml"
    file.write_text(text)
    return file


def test_yaml_is_read_as_version_1_2(tmp_path: Path) -> None:
    spec = read_spec(
        yaml_file(tmp_path, "learning_rate: 1e-4\nmixed_precision: no\nnote: yes\nmodel: on\nseed: 0x10\n")
    )
    assert spec == {"learning_rate": 1e-4, "mixed_precision": "no", "note": "yes", "model": "on", "seed": 16}


def test_json_is_read_as_json(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps({"model": {"config": {"model_type": "llama"}}, "seed": 3}))
    assert read_spec(file) == {"model": {"config": {"model_type": "llama"}}, "seed": 3}


def test_a_date_remains_text(tmp_path: Path) -> None:
    assert read_spec(yaml_file(tmp_path, "metadata: {day: 2026-11-22}")) == {"metadata": {"day": "2026-11-22"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1,", "line"),
        ("a: 1\na: 2", "duplicate key"),
        ("- 1", "must map field names"),
        ("", "is empty"),
        ("metadata: {1: a}", "metadata.1"),
        ("learning_rate: .nan", "learning_rate is not a number"),
        ('note: "\\e[2J"', "note contains the control character U\\+001B"),
        ('metadata: {"a\\0": x}', "contains the control character U\\+0000"),
        ("x: !!python/object:os.system {}", "the tag !!python/object:os.system is not supported"),
        ("a: &x [*x]", "a value that contains it"),
        ("[" * 5000, "is nested more than 100 levels deep"),
        ("a: &x {b: *x}", "a value that contains it"),
        ("a: {b: {c: 1, c: 2}}", "duplicate key"),
        ("a: 1\n---\nb: 2", "several documents"),
        ("%YAML 1.1\n---\na: no", "declares YAML 1.1"),
        ("a: !!set {x}", "the tag !!set is not supported"),
        ("a: !!binary aGk=", "the tag !!binary is not supported"),
        ("a: !env HOME", "the tag !env is not supported"),
        ("a: *gone", "undefined alias"),
        ("a:\n\tb: 1", "in line 2"),
        ("seed: 1" + "0" * 5000, "more than 400 digits"),
        ("learning_rate: 1e999", "learning_rate is too large"),
        ("? [a]\n: 1", "must be a string"),
        ("just text", "is a string"),
    ],
)
def test_an_invalid_spec_file_is_rejected_with_the_position(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=expected):
        read_spec(yaml_file(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    ["2001-12-14t21:59:43.10-05:00", "2001-12-14 21:59:43", "1_000", "1:30", "=", "0b11", "0777_1", "12e03x", "off"],
)
def test_values_that_only_yaml_1_1_converts_remain_text(text: str, tmp_path: Path) -> None:
    expected = {"note": text, "list": [text], "k": text}
    assert read_spec(yaml_file(tmp_path, f"note: {text}\nlist: [{text}]\nk: '{text}'\n")) == expected
    assert apply_settings({}, [f"note={text}"]) == {"note": text}


def test_numbers_are_read_as_in_yaml_1_2(tmp_path: Path) -> None:
    spec = read_spec(yaml_file(tmp_path, "a: 017\nb: 0o17\nc: +3\nd: .5\ne: 1.\nf: -1E+2\ng: ~\nh: True\n"))
    assert spec == {"a": 17, "b": 15, "c": 3, "d": 0.5, "e": 1.0, "f": -100.0, "g": None, "h": True}


def test_aliases_and_merge_keys_work_within_a_limit(tmp_path: Path) -> None:
    text = "dataset: &d {path: a.txt, weight: 1}\neval_dataset: {<<: *d, weight: 2}\nnote: [*d, *d]\n"
    one = {"path": "a.txt", "weight": 1}
    expected = {"dataset": one, "eval_dataset": {"path": "a.txt", "weight": 2}, "note": [one, one]}
    assert read_spec(yaml_file(tmp_path, text)) == expected
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    merges = "a0: &a0 {x: 1}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
    )
    for bomb in (laughs, merges):
        with pytest.raises(InvalidRequest, match="more than 100,000 values"):
            read_spec(yaml_file(tmp_path, bomb))


@pytest.mark.parametrize("name", ["job.json", "job.JSON", "job.yaml", "job"])
def test_json_is_read_as_strictly_as_the_server_reads_it(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    for text, expected in (
        ('{"seed": 1, "lora": {"r": 1, "r": 2}}', "contains 'r' twice in one object"),
        ('{"seed": 1, "seed": 1}', "contains 'seed' twice"),
        ('{"learning_rate": NaN}', "NaN is not a valid JSON number"),
        ('{"learning_rate": -Infinity}', "-Infinity is not a valid JSON number"),
        ('{"learning_rate": 1e999}', "learning_rate is too large"),
        ('{"seed": 1' + "0" * 5000 + "}", "digits"),
        ('{"metadata": ' + '{"a": ' * 150 + "1" + "}" * 151, "is nested more than 100 levels deep"),
        ('{"metadata": ' + "[" * 100_000 + "]" * 100_000 + "}", "is nested more than 100 levels deep"),
    ):
        file.write_text(text)
        with pytest.raises(InvalidRequest, match=expected):
            read_spec(file)
    file.write_bytes(b"\xef\xbb\xbf" + b'{\n\t"seed": 3}\r\n')
    assert read_spec(file) == {"seed": 3}


def test_a_yaml_spec_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(b"\xef\xbb\xbfseed: 3\r\n")
    assert read_spec(file) == {"seed": 3}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("name: caf\xe9\nseed: 1".encode("latin-1"), "not UTF-8 text .byte 0xe9 in line 1.; encode it as UTF-8"),
        ("seed: 1".encode("utf-16"), "UTF-16 or UTF-32"),
        ("seed: 1".encode("utf-16-le"), "UTF-16 or UTF-32"),
        ("seed: 1".encode("utf-16-be"), "UTF-16 or UTF-32"),
        (b"seed: \x00", "not valid YAML"),
        (b"x: " + b"y" * (1 << 24), "more than 16,777,216 bytes"),
        (b"\xef\xbb\xbf", "is empty"),
    ],
)
def test_text_that_is_not_utf8_is_rejected(content: bytes, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(content)
    for given in (None, content):
        with pytest.raises(InvalidRequest, match=expected):
            read_spec(file, given)


def test_a_missing_spec_and_invalid_json_are_rejected_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"missing\.yaml cannot be read"):
        read_spec(tmp_path / "missing.yaml")
    file = tmp_path / "job.json"
    file.write_text('{"seed": 1,\n nope}')
    with pytest.raises(InvalidRequest, match="in line 2"):
        read_spec(file)


def test_settings_change_nested_fields_of_a_copy_of_the_spec() -> None:
    given = {"dataset": [{"builtin": "python-docs"}], "seed": 1}
    changed = apply_settings(
        given, ["lora.r=16", "dataset.0.weight=0.5", "seed=2", "mixed_precision=no", "learning_rate=3e-4", "epochs="]
    )
    assert changed == {
        "dataset": [{"builtin": "python-docs", "weight": 0.5}],
        "seed": 2,
        "lora": {"r": 16},
        "mixed_precision": "no",
        "learning_rate": 3e-4,
        "epochs": None,
    }
    assert given == {"dataset": [{"builtin": "python-docs"}], "seed": 1}


def test_a_setting_may_be_a_whole_object() -> None:
    config = apply_settings({}, ["model={config: {model_type: llama, hidden_size: 64}}"])
    assert config == {"model": {"config": {"model_type": "llama", "hidden_size": 64}}}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("seed", "sets nothing"),
        ("=3", "sets nothing"),
        ("a..b=3", "sets nothing"),
        ("seed.x=3", "set a field of 1; use seed="),
        ("dataset.5.weight=1", "has one item; use the index 0"),
        ("dataset.first.weight=1", "has one item; use the index 0"),
        ("x=[1", "not valid YAML"),
        ("note=@handle", "put text with special characters in quotes"),
        ("dataset.-1.weight=1", "has one item; use the index 0"),
        ("dataset.99999999999999999999.weight=1", "has one item; use the index 0"),
        ("a=1\n---\nb", "several documents"),
    ],
)
def test_a_setting_without_a_valid_path_is_rejected(setting: str, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=expected):
        apply_settings({"seed": 1, "dataset": [{"builtin": "python-docs"}]}, [setting])


def test_a_setting_in_a_source_given_as_a_string_keeps_the_name() -> None:
    assert apply_settings({"dataset": "a.txt"}, ["dataset.weight=2"]) == {"dataset": {"file": "a.txt", "weight": 2}}
    several = apply_settings({"dataset": ["a.txt", "b.txt"]}, ["dataset.1.weight=2"])
    assert several == {"dataset": ["a.txt", {"file": "b.txt", "weight": 2}]}
    for given, setting in (
        ({"dataset": "a.txt"}, "dataset.file.x=1"),
        ({"dataset": {"file": "a.txt"}}, "dataset.file.x=1"),
        ({"eval_dataset": [{"file": "a.txt"}]}, "eval_dataset.0.file.x=1"),
        ({"dataset": {"hub": "org/data"}}, "dataset.hub.revision=main"),
    ):
        with pytest.raises(InvalidRequest, match="can't set a field of '"):
            apply_settings(given, [setting])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("chats.jsonl", '{"messages": []}', True),
        ("chats.jsonl.gz", "", True),
        ("rows.csv", "text\na", True),
        ("ids.bin", "", True),
        ("rows.json", '\n[{"text": "a"}]', True),
        ("book.txt", "Once: upon: a time", True),
        ("book.md", "Only text.", True),
        ("job.txt", "model: org/name", False),
        ("job.json", '{"model": "org/name"', False),
        ("job.yaml", "- 1", False),
        ("job", "nope: [", False),
    ],
)
def test_data_given_as_a_spec_is_recognized(name: str, content: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert looks_like_data(tmp_path / name) is expected
    assert looks_like_data(tmp_path), "a folder contains data"
    assert not looks_like_data(tmp_path / f"missing-{name}")


@pytest.mark.parametrize("command", ["validate", "submit"])
def test_data_given_as_a_spec_is_rejected_with_the_right_option(command: str, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    words = [sys.executable, "-m", "zeta", command, "chats.jsonl"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "chats.jsonl looks like data; use --data chats.jsonl." in done.stderr
