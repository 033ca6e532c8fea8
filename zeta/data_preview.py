"""Previewing rows of local data, in a process that loads the training packages: `zeta data show`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from zeta.job_ids import looks_like_checkpoint
from zeta.local_files import exists, expanded, template_text
from zeta.local_inputs import DATA_FIELDS, existing, model_config, source_object
from zeta.spec_file import MAX_BYTES, apply_settings, read_spec
from zeta_core.contract.errors import ErrorBody, InvalidRequest, Unavailable, ZetaError
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.data_preview import ShownRows, ShowRequest
from zeta_core.contract.strict_json import JsonFault, JsonRules, read_json
from zeta_core.system.settings import process_environment

_SPEC_SUFFIXES = (".yaml", ".yml", ".json")
_LAST_LINES = 5
# Duplicate names and the like do not turn a spec into data; `read_spec` then rejects them.
_LENIENT = JsonRules(
    allow_byte_order_mark=True,
    allow_duplicate_names=True,
    allow_nonfinite=True,
    allow_control_characters=True,
)


class RowsRejected(ZetaError):
    """Training would reject the data or the model."""

    type = "training_error"
    code = "failed"


def local_spec(source: str, model: str | None, tokenizer: str | None, settings: list[str]) -> dict[str, Any]:
    """The spec of a job with local paths, from a spec file or a dataset, and the options of the command."""
    spec = _spec_in(source)
    if spec is None:
        spec = dict[str, Any](dataset=source_object(source))
    if model is not None:
        spec["model"] = model
    if tokenizer is not None:
        spec["tokenizer"] = tokenizer
    spec = apply_settings(spec, settings)
    for name in DATA_FIELDS:
        if spec.get(name) is not None:
            several = isinstance(spec[name], list)
            expanded_sources = [_local_source(name, item) for item in (spec[name] if several else [spec[name]])]
            sources = [item for expanded in expanded_sources for item in expanded]
            spec[name] = sources if several or len(sources) > 1 else sources[0]
    spec["model"] = _local_model(spec.get("model"))
    spec["chat_template"] = template_text(spec.get("chat_template"))
    return spec


def preview_rows(spec: dict[str, Any], rows: int, row: int | None) -> ShownRows:
    """Read rows in a process that loads the training packages.

    Raises `InvalidRequest`, `RowsRejected`, and `Unavailable` if these packages are missing.
    """
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        raise Unavailable(
            "`zeta data show` needs the training packages on this machine; run `pip install 'zeta-train[train]'`. "
            "`zeta validate` checks all rows on a worker.",
            code="missing_extra",
        )
    request = ShowRequest(spec={name: value for name, value in spec.items() if value is not None}, rows=rows, row=row)
    done = subprocess.run(
        [sys.executable, "-P", "-X", "utf8", "-m", "zeta_core", "show"],
        input=request.model_dump_json(),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**process_environment(), "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    try:
        if done.returncode == 0:
            return ShownRows.model_validate_json(done.stdout)
        error = ErrorBody.model_validate_json(done.stdout).error
    except ValidationError:
        last = " ".join(done.stderr.strip().splitlines()[-_LAST_LINES:]) or "no output"
        raise RowsRejected(f"The rows could not be read (exit code {done.returncode}): {last}") from None
    error_class = InvalidRequest if error.type == InvalidRequest.type else RowsRejected
    raise error_class(error.message, code=error.code, param=error.param, details=error.details)


def _spec_in(source: str) -> dict[str, Any] | None:
    """The spec in a file, or ``None`` if the file contains data. A spec is an object with a dataset or a model."""
    path = expanded(source)
    suffix = path.suffix.lower()
    if suffix not in _SPEC_SUFFIXES or not exists(path) or not path.is_file():
        return None
    return None if suffix == ".json" and _is_data(path) else read_spec(path)


def _is_data(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        value = None if len(content) > MAX_BYTES else read_json(content, _LENIENT)
    except OSError:
        return False  # `read_spec` reports it
    except JsonFault:
        return True  # the reader of the data reports it
    return not isinstance(value, dict) or not value.keys() & {"dataset", "model"}


def _local_source(name: str, value: Any) -> list[Any]:
    """The sources for a value of ``dataset``: one with an absolute path for each local file, or the value itself."""
    if isinstance(value, str):
        value = source_object(value)
    if not isinstance(value, dict) or "file" not in value:
        return [value]
    source = cast("dict[str, Any]", value)
    files: Any = source["file"]
    sources: list[Any] = []
    for file in cast("list[Any]", files if isinstance(files, list) else [files]):
        if not isinstance(file, str):
            raise InvalidRequest(
                f"{name}.file is {file!r}; it must be the path of a file.", param=name, code="invalid_value"
            )
        if is_id(file, "file"):
            raise InvalidRequest(
                f"{name} names {file!r}, an uploaded file; name the local file with --set {name}=FILE, because rows "
                "are read on this machine.",
                param=name,
                code="invalid_value",
            )
        path = existing(file, name)
        rest = {field: content for field, content in source.items() if field != "file"}
        sources.append({**rest, "path": os.path.abspath(path)})
    return sources


def _local_model(model: Any) -> Any:
    """A model as this machine finds it: a local folder, a GGUF file, a Hub id or a config."""
    if isinstance(model, dict) and "job" in model:
        raise _stored_by_job(cast("dict[str, Any]", model)["job"])
    if isinstance(model, dict) and "file" in model:
        model = cast("dict[str, Any]", model)["file"]
        if not isinstance(model, str):
            raise InvalidRequest(f"model.file is {model!r}; it must be the path of a model.", param="model")
        if not is_id(model, "file"):
            existing(model, "model.file")
    if not isinstance(model, str):
        return model
    path = expanded(model)
    if exists(path):
        return {"config": model_config(path)} if path.suffix == ".json" else str(path.absolute())
    if looks_like_checkpoint(model):
        raise _stored_by_job(model)
    if is_id(model, "file"):
        raise InvalidRequest(
            f"model is {model!r}, an uploaded file; name a local folder or a Hub id with --model.", param="model"
        )
    if model.startswith((".", "/", "~")):
        existing(model, "model")
    return model


def _stored_by_job(named: Any) -> InvalidRequest:
    job = str(named).partition("/")[0]
    return InvalidRequest(
        f"model is {named!r}, which is stored on the server; run `zeta download {job} -o DIR`, then use --model DIR.",
        param="model",
        code="invalid_value",
    )
