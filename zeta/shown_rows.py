"""Showing rows of local data by a process of the training packages: `zeta data show`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from zeta.local_inputs import DATA_FIELDS, source_object
from zeta.settings import environment
from zeta.spec_file import apply_settings, read_spec
from zeta.template_file import template_text
from zeta_core.contract.errors import ErrorBody, InvalidRequest, Unavailable
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.shown_rows import ShownRows, ShowOrder

_SPEC_SUFFIXES = (".yaml", ".yml", ".json")
_LAST_LINES = 5


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
            found = [_local_source(name, one) for one in (spec[name] if several else [spec[name]])]
            sources = [one for each in found for one in each]
            spec[name] = sources if several or len(sources) > 1 else sources[0]
    spec["model"] = _local_model(spec.get("model"))
    spec["chat_template"] = template_text(spec.get("chat_template"))
    return spec


def shown_rows(spec: dict[str, Any], rows: int, row: int | None) -> ShownRows:
    """Read rows in a process with the training packages. Raises `InvalidRequest`, and `Unavailable` without them."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        raise Unavailable(
            "`zeta data show` needs the training packages on this machine; run `pip install 'zeta-train[train]'`. "
            "`zeta validate` checks all rows on a worker.",
            code="missing_extra",
        )
    order = ShowOrder(spec={name: value for name, value in spec.items() if value is not None}, rows=rows, row=row)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "zeta_core", "show"],
        input=order.model_dump_json(),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=dict(environment()),
        check=False,
    )
    try:
        if done.returncode == 0:
            return ShownRows.model_validate_json(done.stdout)
        error = ErrorBody.model_validate_json(done.stdout).error
    except ValidationError:
        last = " ".join(done.stderr.strip().splitlines()[-_LAST_LINES:]) or "no output"
        raise InvalidRequest(
            f"The rows could not be read (exit code {done.returncode}): {last}", code="failed"
        ) from None
    raise InvalidRequest(error.message, code=error.code, param=error.param, details=error.details)


def _spec_in(source: str) -> dict[str, Any] | None:
    """The spec in a file, or ``None`` if the file contains data. A spec is an object with a dataset or a model."""
    path = Path(source).expanduser()
    if path.suffix.lower() not in _SPEC_SUFFIXES or not path.is_file():
        return None
    if path.suffix.lower() == ".json":
        try:
            content: object = json.loads(path.read_bytes())
        except ValueError:
            return None  # the reader of the data reports it
        if not isinstance(content, dict) or not content.keys() & {"dataset", "model"}:
            return None
    return read_spec(path)


def _local_source(name: str, given: Any) -> list[Any]:
    """A source with its local files as paths, each of which is a source."""
    if isinstance(given, str):
        given = source_object(given)
    if not isinstance(given, dict) or "file" not in given:
        return [given]
    source = cast("dict[str, Any]", given)
    files: Any = source["file"]
    found: list[Any] = []
    for file in cast("list[Any]", files if isinstance(files, list) else [files]):
        if not isinstance(file, str) or is_id(file, "file"):
            raise InvalidRequest(
                f"{name} names {file!r}, an uploaded file; name the local file, because rows are read on this machine.",
                param=name,
                code="invalid_value",
            )
        if not Path(file).expanduser().exists():
            raise InvalidRequest(
                f"{name} is {file!r}, but there is no such file or folder here.", param=name, code="no_such_file"
            )
        rest = {field: value for field, value in source.items() if field != "file"}
        found.append({**rest, "path": os.path.abspath(os.path.expanduser(file))})
    return found


def _local_model(model: Any) -> Any:
    """A model as this machine finds it: a local folder, a GGUF file, a Hub id or a config."""
    if isinstance(model, dict) and ("job" in model or "file" in model):
        file = model.get("file")
        if not isinstance(file, str) or is_id(file, "file"):
            raise InvalidRequest(
                "model is stored on the server; name a local folder or a Hub id with --model.", param="model"
            )
        model = file
    if isinstance(model, str) and (path := Path(model).expanduser()).exists():
        if path.suffix == ".json":
            return {"config": json.loads(path.read_bytes())}
        return str(path.absolute())
    return model
