"""Importing an exported fine-tuning job of OpenAI: its settings become a request of the server's ``/openai/v1``.

An export is the JSON object of OpenAI's ``GET /v1/fine_tuning/jobs/{id}``. Its training file is a local file, because
OpenAI's file ids mean nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from zeta.errors import parse_response
from zeta.local_files import shown_path
from zeta.local_inputs import existing, upload_message
from zeta.request_parts import creation_headers, json_body
from zeta.transport import HttpTransport
from zeta_core.contract.errors import InvalidRequest, NotFound, ZetaError
from zeta_core.contract.job.responses import StoredFile
from zeta_core.contract.spec.validation import shown
from zeta_core.contract.strict_json import JsonFault, read_json

MAX_BYTES = 2**20  # of an export, which has some kilobytes
_PATH = "/openai/v1"
_OBJECT = "fine_tuning.job"
_HOW_TO_EXPORT = "export a job with client.fine_tuning.jobs.retrieve(ID).to_json()"
_METHODS = ("supervised", "dpo")
_HYPERPARAMETERS = ("batch_size", "learning_rate_multiplier", "n_epochs")
_WANDB = ("project", "entity", "name", "tags")

# The outcome of the exported job; they are not settings.
_RESULTS = frozenset(
    {
        *("id", "object", "created_at", "finished_at", "estimated_finish", "status", "error", "fine_tuned_model"),
        *("result_files", "trained_tokens", "usage_metrics"),
    }
)

Upload = Callable[[Path], StoredFile]


class _CreatedJob(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: str


@dataclass(frozen=True)
class TranslatedJob:
    """The body of a request that creates the job, and the settings that it can't contain, by their path."""

    request: dict[str, Any]
    not_imported: dict[str, Any]


def read_export(file: Path) -> dict[str, Any]:
    """The exported job in a JSON file. Raises `InvalidRequest` naming the file."""
    name = shown_path(file)
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequest(f"The export {name} cannot be read: {reason}.", code="unreadable_export") from error
    if len(content) > MAX_BYTES:
        raise InvalidRequest(
            f"The export {name} has more than {MAX_BYTES:,} bytes; name the JSON file of one job, and its training "
            "file with --data.",
            code="export_too_large",
        )
    try:
        exported = read_json(content)
    except JsonFault as fault:
        raise InvalidRequest(fault.sentence(f"The export {name}"), code="unreadable_export") from fault
    if not isinstance(exported, dict):
        raise InvalidRequest(f"The export {name} is not an object; {_HOW_TO_EXPORT}.", code="invalid_export")
    return cast("dict[str, Any]", exported)


def import_job(
    transport: HttpTransport,
    upload: Upload,
    exported: Mapping[str, Any],
    *,
    data: Path | None,
    validation_data: Path | None,
    on_upload: Callable[[str], None],
) -> tuple[str, dict[str, Any]]:
    """Create a job with the settings of an exported one. Returns its id, and the settings that are not imported.

    The model is checked before a file is uploaded. Raises `InvalidRequest` for an export that can't be imported, and
    `NotFound` for a model without a name here.
    """
    translated = translate(exported)
    request = dict(translated.request)
    not_imported = dict(translated.not_imported)
    if data is None and "training_file" not in request:
        raise InvalidRequest(
            f"The job's training_file is {shown(exported.get('training_file'))}, which is not a file of this service; "
            "download it from OpenAI, and name it with --data FILE.",
            param="--data",
            code="no_training_file",
        )
    files = {"training_file": ("--data", data), "validation_file": ("--validation-data", validation_data)}
    paths = {field: existing(str(path), option) for field, (option, path) in files.items() if path is not None}
    _check_model(transport, request["model"])
    for field, path in paths.items():
        stored = upload(path)
        on_upload(f"{upload_message(path, stored)}.")
        request[field] = stored.id
        not_imported.pop(field, None)
    response = transport.request(
        "POST", f"{_PATH}/fine_tuning/jobs", content=json_body(request), headers=creation_headers(None)
    )
    return parse_response(_CreatedJob, response).id, not_imported


def translate(exported: Mapping[str, Any]) -> TranslatedJob:
    """Translate an exported job. Unset settings and results are omitted. Files are included only if they exist here.

    Raises `InvalidRequest` if it is not a job, or its method can't be imported.
    """
    model = exported.get("model")
    if exported.get("object") != _OBJECT or not isinstance(model, str) or not model:
        raise InvalidRequest(
            f"The export has the object {shown(exported.get('object'))} and the model {shown(model)}, "
            f"but a job has the object {_OBJECT!r} and the name of a model; {_HOW_TO_EXPORT}.",
            code="invalid_export",
        )
    left = {name: value for name, value in exported.items() if name not in _RESULTS and _is_set(value)}
    request: dict[str, Any] = {name: left.pop(name) for name in ("model", "seed", "metadata") if name in left}
    for name in ("training_file", "validation_file"):
        if str(left.get(name)).startswith("file_"):  # of this service; OpenAI's ids begin with file-
            request[name] = left.pop(name)
    left.pop("training_file", None)
    if suffix := left.pop("user_provided_suffix", None) or _suffix(exported.get("fine_tuned_model")):
        request["suffix"] = suffix
    request["method"], unknown = _method(left)
    if integrations := left.pop("integrations", None):
        wandb, unknown_integrations = _integrations(integrations)
        unknown |= unknown_integrations
        if wandb:
            request["integrations"] = [{"type": "wandb", "wandb": wandb}]
    return TranslatedJob(request, left | unknown)


def _method(left: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Remove the method and the deprecated ``hyperparameters``. Returns the method, and the rest of its settings.

    An old export has only ``hyperparameters``; a newer one repeats there the values of the method.
    """
    given = _object(left.pop("method", {}), "method")
    kind = given.pop("type", "supervised")
    if kind not in _METHODS:
        raise InvalidRequest(
            f"method.type is {shown(kind)}, which can't be imported; only 'supervised' and 'dpo' jobs can.",
            param="method.type",
            code="unsupported_method",
        )
    of_method = _object(given.pop(kind, {}), f"method.{kind}")
    hyperparameters = _object(left.pop("hyperparameters", {}), "hyperparameters")
    hyperparameters |= _object(of_method.pop("hyperparameters", {}), f"method.{kind}.hyperparameters")
    known = (*_HYPERPARAMETERS, "beta") if kind == "dpo" else _HYPERPARAMETERS
    unknown = _settings(hyperparameters, "hyperparameters", without=known)
    unknown |= _settings(of_method, f"method.{kind}") | _settings(given, "method")
    chosen = {name: hyperparameters[name] for name in known if name in hyperparameters}
    return {"type": kind, kind: {"hyperparameters": chosen}}, unknown


def _integrations(integrations: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the first W&B run, and all other settings."""
    wandb: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for index, item in enumerate(integrations if isinstance(integrations, list) else [integrations]):
        path = f"integrations.{index}"
        integration = _object(item, path)
        if wandb or integration.get("type") != "wandb" or "wandb" not in integration:
            unknown[path] = item
            continue
        settings = _object(integration["wandb"], f"{path}.wandb")
        wandb = {name: settings[name] for name in _WANDB if name in settings}
        unknown |= _settings(settings, f"{path}.wandb", without=_WANDB)
        unknown |= _settings(integration, path, without=("type", "wandb"))
    return wandb, unknown


def _check_model(transport: HttpTransport, model: str) -> None:
    """Raise `NotFound` with the command that names the model, unless the server knows it."""
    try:
        transport.request("GET", f"{_PATH}/models/{quote(model, safe='/:')}")
    except ZetaError as error:
        if error.code != "model_not_found":
            raise
        if model.startswith("ft:"):  # a base model can't have such a name
            fix = "it is fine-tuned and exists only at OpenAI; replace it in the export with the name of a base model"
        else:
            fix = f"name a base model for it with `zeta models add {model} SOURCE`, and import the job again"
        raise NotFound(
            f"The job's model {shown(model)} does not exist here; {fix}. `zeta models list` shows the existing names.",
            code=error.code,
            param="model",
        ) from error


def _suffix(fine_tuned_model: Any) -> str | None:
    """The suffix in ``ft:<base>:<organization>:<suffix>:<id>``, in which it may be empty."""
    parts = fine_tuned_model.split(":") if isinstance(fine_tuned_model, str) else []
    return parts[-2] or None if len(parts) >= 5 and parts[0] == "ft" else None


def _object(value: Any, path: str) -> dict[str, Any]:
    """The set fields of a JSON object. Raises `InvalidRequest` for another value."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path} is {shown(value)}; it must be an object.", param=path, code="invalid_export")
    return {name: item for name, item in cast("dict[str, Any]", value).items() if _is_set(item)}


def _settings(fields: Mapping[str, Any], path: str, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields by their path in the export."""
    return {f"{path}.{name}": value for name, value in fields.items() if name not in without}


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {})
