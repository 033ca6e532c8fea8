"""The resolved spec is typed for readers, and the same JSON object in messages, files and the database."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from zeta_core.contract.job.events import JOURNAL_LINE, StatusLine
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.spec.defaults import resolve
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.spec.validation import parse
from zeta_core.contract.wire.messages import Dispatch
from zeta_core.contract.wire.run_directory import RunFile

RECORDED: dict[str, Any] = {
    "model": {"job": "job_1", "checkpoint": "step-5"},
    "optimizer": "adamw",
    "learning_rate": None,
    "warmup_steps": 3,
    "epochs": 1.0,
    "lora": {"r": 8, "added_in_a_later_version": True},
    "resources": {"gpus": 0, "nodes": 1, "processes": None, "added_in_a_later_version": [1]},
    "files": {"file_1": {"filename": "a.txt", "sha256": "0", "purpose": "dataset", "bytes": 4}},
    "data_report": {"sequences": 21},
    "added_in_a_later_version": {"nested": [None, 1.5]},
}


def test_reading_and_writing_changes_nothing() -> None:
    for recorded in (RECORDED, {}, {"device_kind": "cpu:old"}, {"threads": None}):
        assert json.dumps(ResolvedSpec.model_validate(recorded).as_json(), sort_keys=True) == json.dumps(
            recorded, sort_keys=True
        )


def test_messages_and_journal_lines_contain_the_same_object() -> None:
    fields = {"job_id": "job_1", "attempt": 1, "spec": {}, "resolved_spec": RECORDED}
    dispatch = Dispatch.model_validate({**fields, "worker": "w", "slots": [0]})
    run_file = RunFile.model_validate({**fields, "output_dir": "/o", "artifacts_root": "/a"})
    for message in (dispatch, run_file):
        assert json.loads(message.model_dump_json())["resolved_spec"] == RECORDED
    line = JOURNAL_LINE.validate_python({"type": "status", "status": "running", "resolved_spec": RECORDED})
    assert isinstance(line, StatusLine)
    assert line.model_dump(mode="json", exclude_none=True)["resolved_spec"] == RECORDED
    assert StatusLine(status=JobStatus.RUNNING).model_dump(exclude_none=True).keys() == {"created_at", "type", "status"}


def test_decided_fields_are_typed_and_other_options_are_kept() -> None:
    resolved = ResolvedSpec.model_validate(RECORDED)
    assert (resolved.warmup_steps, resolved.epochs, resolved.num_sequences) == (3, 1.0, 21)
    assert resolved.files["file_1"].bytes == 4
    assert resolved.resources is not None
    assert resolved.resources.num_processes == 1
    assert resolved.job_model is not None
    assert (resolved.job_model.job, resolved.job_model.checkpoint) == ("job_1", "step-5")
    assert (resolved.value("optimizer"), resolved.value("pack")) == ("adamw", None)
    assert (resolved["optimizer"], "pack" in resolved, {**resolved}) == ("adamw", False, RECORDED)
    with pytest.raises(ValidationError, match="frozen"):
        resolved.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_values_of_unknown_types_are_kept_and_read_as_missing() -> None:
    recorded = {**RECORDED, "threads": "eight", "files": ["a.txt"], "device_kind": 3}
    resolved = ResolvedSpec.model_validate_json(json.dumps(recorded))
    assert (resolved.threads, resolved.files, resolved.device_kind, resolved.epochs) == (None, {}, None, 1.0)
    assert resolved.as_json() == recorded
    assert resolved.updated(ResolvedSpec.model_validate({"threads": 2})).as_json() == {**recorded, "threads": 2}


def test_an_update_replaces_the_fields_that_it_has() -> None:
    resolved = ResolvedSpec.model_validate(RECORDED)
    updated = resolved.updated(ResolvedSpec.model_validate({"learning_rate": 0.1, "resources": {"gpus": 1}, "new": 2}))
    assert updated.as_json() == {**RECORDED, "learning_rate": 0.1, "resources": {"gpus": 1}, "new": 2}
    assert resolved.as_json() == RECORDED


def test_every_option_of_a_spec_is_recorded() -> None:
    spec = parse(JobSpec, {"model": "org/name", "dataset": {"builtin": "python-docs"}, "lora": {}})
    only_for_the_server = {"notify"}
    assert JobSpec.model_fields.keys() - only_for_the_server <= resolve(spec).keys()
    assert resolve(spec).value("lora") == spec.model_dump(mode="json")["lora"]
