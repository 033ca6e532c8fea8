"""A spec as people write it."""

import json
from pathlib import Path

import pytest

from zeta.spec_file import apply_settings, read_spec
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


def test_a_date_stays_the_text_that_was_written(tmp_path: Path) -> None:
    assert read_spec(yaml_file(tmp_path, "metadata: {day: 2026-11-22}")) == {"metadata": {"day": "2026-11-22"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1,", "line"),
        ("a: 1\na: 2", "duplicate key"),
        ("- 1", "must map field names"),
        ("", "is empty"),
        ("metadata: {1: a}", "metadata.1"),
        ("learning_rate: .nan", "learning_rate"),
        ("x: !!python/object:os.system {}", "not YAML"),
        ("a: &x [*x]", "holds itself"),
        ("[" * 5000, "nested too deep"),
    ],
)
def test_what_is_no_spec_is_refused_with_the_place(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=expected):
        read_spec(yaml_file(tmp_path, text))


def test_a_missing_spec_and_broken_json_are_refused_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"missing\.yaml cannot be read"):
        read_spec(tmp_path / "missing.yaml")
    file = tmp_path / "job.json"
    file.write_text('{"seed": 1,\n nope}')
    with pytest.raises(InvalidRequest, match="in line 2"):
        read_spec(file)


def test_settings_reach_into_objects_and_lists_and_leave_the_given_spec_alone() -> None:
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
        ("seed.x=3", "has no fields"),
        ("dataset.5.weight=1", "a place from 0 to 0"),
        ("dataset.first.weight=1", "a place from 0 to 0"),
        ("x=[1", "not YAML"),
    ],
)
def test_a_setting_that_fits_nowhere_is_refused_by_name(setting: str, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=expected):
        apply_settings({"seed": 1, "dataset": [{"builtin": "python-docs"}]}, [setting])
