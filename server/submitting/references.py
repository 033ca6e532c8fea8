"""Validates the references of a spec: files, jobs, checkpoints, paths and Hub ids must exist and be allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.checkpoints import LATEST, checkpoints_newest_first
from server.database.file_tables import FileRow
from server.database.tables import CheckpointRow, JobRow
from server.service import Service
from server.settings import ServerSettings
from server.submitting.notify_targets import notify_faults
from server.uploads.file_checks import unreadable
from zeta_core.contract.access import HubAccess
from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.checkpoint import NAME_PATTERN
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.responses import FilePurpose
from zeta_core.contract.spec.batch_spec import BatchSpec
from zeta_core.contract.spec.evaluation_spec import EvaluationSpec
from zeta_core.contract.spec.export_spec import ExportSpec
from zeta_core.contract.spec.held_out import HeldOutData, held_out_data
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.kinds import AnySpec
from zeta_core.contract.spec.resolved_spec import UploadedFile
from zeta_core.contract.spec.sources import (
    DatasetSource,
    FileModel,
    FileSource,
    FileTokenizer,
    HubSource,
    JobModel,
    PathSource,
    named_sources,
)
from zeta_core.contract.spec.validation import error_from_details, shown

SpecT = TypeVar("SpecT", JobSpec, ExportSpec, BatchSpec, EvaluationSpec, AnySpec)


async def check_references(
    session: AsyncSession, service: Service, caller: Caller, spec: AnySpec
) -> dict[str, UploadedFile]:
    """The uploaded files that the job reads, by id.

    Locks these files and the referenced jobs against deletion until the transaction ends. Raises `InvalidSpec` with
    every invalid reference.
    """
    files: dict[str, UploadedFile] = {}
    project = caller.project
    details: list[ErrorDetail] = []
    references: list[_FileReference] = []
    details += _hub_errors(service.settings, caller, spec)
    if isinstance(spec, JobSpec):
        details += _path_errors(service, spec)
        references += _file_references(spec)
        details += await notify_faults(session, service.settings, project, spec.notify)
    elif isinstance(spec, BatchSpec):
        references += _files_of_batch(spec)
    elif isinstance(spec, EvaluationSpec):
        references += _files_of_evaluation(spec)
    rows = await _file_rows(session, project, {reference.file_id for reference in references})
    for reference in references:
        param, file_id, purpose = reference.param, reference.file_id, reference.purpose
        row = rows.get(file_id)
        if row is None:
            message = f"{param} is {shown(file_id)}, which is not an uploaded file; upload it with POST /v1/files."
            details.append(ErrorDetail(param=param, message=message, code="file_not_found"))
        elif row.purpose != purpose:
            message = f"{param} is {file_id!r}, uploaded with purpose {row.purpose!r}; it must be {purpose!r}."
            details.append(ErrorDetail(param=param, message=message, code="wrong_purpose"))
        elif purpose == "dataset" and (fault := unreadable(row.filename, as_tokens=reference.as_tokens)) is not None:
            details.append(ErrorDetail(param=param, message=f"{param} {fault}", code="unknown_format"))
        else:
            files[file_id] = UploadedFile(
                filename=row.filename, sha256=row.sha256, purpose=row.purpose, bytes=row.bytes
            )
    for param, job_id, checkpoint in _checkpoint_references(spec):
        fault = await _checkpoint_fault(session, project, job_id, checkpoint)
        if fault is not None:
            code, sentence = fault
            details.append(ErrorDetail(param=param, message=f"{param} {sentence}", code=code))
    if details:
        raise error_from_details(details)
    return files


async def inputs_of_export(
    session: AsyncSession, spec: ExportSpec
) -> tuple[dict[str, UploadedFile], HeldOutData | None]:
    """The uploaded files that an export reads, and the held-out data of the job unless its files were deleted.

    The base of the job may be an uploaded file, too. Locks the files of the data against deletion.
    """
    job = await session.get_one(JobRow, spec.model.job)
    held_out = None
    with suppress(ValidationError):  # an earlier version may have accepted the spec
        held_out = held_out_data(JobSpec.model_validate(job.spec), job.resolved_spec)
    if held_out is not None and held_out.file_ids - (await _file_rows(session, job.project, held_out.file_ids)).keys():
        held_out = None
    return job.resolved_spec.files, held_out


async def _file_rows(session: AsyncSession, project: str, file_ids: set[str]) -> dict[str, FileRow]:
    """The project's files with these ids, locked against deletion in a fixed order to avoid deadlocks."""
    ids = sorted(file_id for file_id in file_ids if is_id(file_id, "file"))
    if not ids:
        return {}
    query = select(FileRow).where(FileRow.id.in_(ids), FileRow.project == project).order_by(FileRow.id)
    return {row.id: row for row in await session.scalars(query.with_for_update(read=True))}


def _data_sources(spec: JobSpec) -> Iterator[tuple[str, DatasetSource]]:
    """Every data source, preceded by its path in the spec, such as ``dataset.0``."""
    yield from named_sources("dataset", spec.dataset)
    yield from named_sources("eval_dataset", spec.eval_dataset)


@dataclass(frozen=True)
class _FileReference:
    """A spec's reference to an uploaded file: the field, and the required kind of file."""

    param: str
    file_id: str
    purpose: FilePurpose
    as_tokens: bool = False


def _file_references(spec: JobSpec) -> Iterator[_FileReference]:
    for path, source in _data_sources(spec):
        if isinstance(source, FileSource):
            as_tokens = spec.use_pretokenized or source.format == "tokens"
            for file_id in source.file_ids:
                yield _FileReference(f"{path}.file", file_id, "dataset", as_tokens)
    if isinstance(spec.model, FileModel):
        yield _FileReference("model.file", spec.model.file, "model")
    if isinstance(spec.tokenizer, FileTokenizer):
        yield _FileReference("tokenizer.file", spec.tokenizer.file, "model")


def _files_of_batch(spec: BatchSpec) -> Iterator[_FileReference]:
    yield _FileReference("input.file", spec.input.file, "batch")
    if isinstance(spec.model, FileModel):
        yield _FileReference("model.file", spec.model.file, "model")


def _files_of_evaluation(spec: EvaluationSpec) -> Iterator[_FileReference]:
    """An error names the field of the request, ``file``."""
    as_tokens = spec.use_pretokenized or spec.dataset.format == "tokens"
    for file_id in spec.dataset.file_ids:
        yield _FileReference("file", file_id, "dataset", as_tokens)
    if isinstance(spec.base, FileModel):
        yield _FileReference("base.file", spec.base.file, "model")


def _checkpoint_references(spec: AnySpec) -> Iterator[tuple[str, str, str]]:
    if isinstance(spec.model, JobModel):
        yield "model.job", spec.model.job, spec.model.checkpoint
    if isinstance(spec, EvaluationSpec) and isinstance(spec.base, JobModel):
        yield "base.job", spec.base.job, spec.base.checkpoint
    if isinstance(spec, JobSpec) and spec.resume_from_checkpoint is not None:
        job_id, _, name = spec.resume_from_checkpoint.partition("/")
        yield "resume_from_checkpoint", job_id, name or LATEST


def _path_errors(service: Service, spec: JobSpec) -> Iterator[ErrorDetail]:
    """Rejects paths outside the data root, and all paths if neither this server nor a known worker has a data root.

    A server that started during an outage of Redis doesn't know any worker yet; then the worker checks the path.
    """
    workers = service.engine.workers()
    has_root = service.settings.data_root is not None or any(beat.data_root is not False for beat in workers)
    has_root = has_root or (not workers and not service.engine.redis_ok)
    for path, source in _data_sources(spec):
        if not isinstance(source, PathSource):
            continue
        param = f"{path}.path"
        if not _inside_data_root(source.path):
            message = (
                f"{param} is {shown(source.path)}, which leaves the workers' data root; "
                "give a path relative to ZETA_DATA_ROOT, without '..'."
            )
            yield ErrorDetail(param=param, message=message, code="path_outside_root")
        elif not has_root:
            message = (
                f"{param} is {shown(source.path)}, but ZETA_DATA_ROOT is not set; upload the data with "
                "POST /v1/files, or set ZETA_DATA_ROOT on the server and its workers."
            )
            yield ErrorDetail(param=param, message=message, code="no_data_root")


def _hub_errors(settings: ServerSettings, caller: Caller, spec: AnySpec) -> Iterator[ErrorDetail]:
    """Rejects Hub ids that this server's ``ZETA_HUB`` or the limits of the project do not allow."""
    data, model = "POST /v1/files", "POST /v1/files with purpose=model"
    named: list[tuple[str, str, str]] = []
    if isinstance(spec, JobSpec):
        sources = _data_sources(spec)
        named += [(f"{path}.hub", source.hub, data) for path, source in sources if isinstance(source, HubSource)]
    for param in ("model", "tokenizer", "base"):
        if isinstance(hub_id := getattr(spec, param, None), str):
            named.append((param, hub_id, model))
    for param, hub_id, instead in named:
        if caller.limits.hub_access == HubAccess.OFF:
            reason = "this project may not read the Hugging Face Hub (its limit `hub` is off)"
        elif not settings.hub_allows(hub_id):
            reason = "ZETA_HUB does not allow it on this server"
        else:
            continue
        message = f"{param} is {hub_id!r}, and {reason}; upload it with {instead}."
        yield ErrorDetail(param=param, message=message, code="hub_not_allowed")


def _inside_data_root(path: str) -> bool:
    pure = PurePosixPath(path.replace("\\", "/"))
    return not pure.is_absolute() and ".." not in pure.parts and not path.startswith("~") and ":" not in path


async def resolve_latest(session: AsyncSession, spec: SpecT) -> SpecT:
    """The spec with ``latest`` replaced by the newest checkpoint: all attempts start from the same weights."""
    if not isinstance(spec.model, JobModel) or spec.model.checkpoint != LATEST:
        return spec
    name = await session.scalar(checkpoints_newest_first(spec.model.job).limit(1))
    return spec.model_copy(update={"model": spec.model.model_copy(update={"checkpoint": name})})


async def check_training_state(service: Service, caller: Caller, spec: JobSpec) -> None:
    """Raise `InvalidSpec` if the spec resumes a checkpoint without training state.

    After a job has ended, only its last checkpoints keep theirs. `check_references` reports checkpoints that don't
    exist or belong to another project.
    """
    job_id, _, name = (spec.resume_from_checkpoint or "").partition("/")
    if not name or name == LATEST:
        return
    async with service.database.read() as session:
        job = await session.get(JobRow, job_id)
        exists = job is not None and job.project == caller.project and job.deleted_at is None
        row = exists and await session.get(CheckpointRow, (job_id, name))
    stored = await asyncio.to_thread(service.artifacts.checkpoint, job_id, name) if row else None
    if stored is not None and not any(file.role == "state" for file in stored.manifest.files):
        message = (
            f"resume_from_checkpoint names checkpoint {name!r} of {job_id}, which has no training state; "
            f"omit the name to resume from the newest checkpoint, or start from these weights: "
            f'"model": {{"job": "{job_id}", "checkpoint": "{name}"}}.'
        )
        raise error_from_details(
            [ErrorDetail(param="resume_from_checkpoint", message=message, code="no_training_state")]
        )


async def _checkpoint_fault(
    session: AsyncSession, project: str, job_id: str, checkpoint: str
) -> tuple[str, str] | None:
    """The reason why the checkpoint can't be used: an error code, and a sentence without its subject."""
    locked = {"read": True}  # against deletion
    job = await session.get(JobRow, job_id, with_for_update=locked) if is_id(job_id, "job") else None
    if job is None or job.project != project or job.deleted_at is not None:
        return "job_not_found", f"names {shown(job_id)}, which is not a job of this project."
    if job.kind != JobKind.TRAINING:
        return "not_a_training", f"names {job_id}, a job of kind {job.kind}; name the training job itself."
    if checkpoint != LATEST and not NAME_PATTERN.match(checkpoint):
        return "invalid_value", f"names checkpoint {shown(checkpoint)}; use 'step-N', 'best', 'final' or 'latest'."
    names = list(await session.scalars(select(CheckpointRow.name).where(CheckpointRow.job_id == job_id)))
    if checkpoint in names or (checkpoint == LATEST and names):
        return None
    has = f"it has {', '.join(sorted(names))}" if names else "it has none yet"
    return "checkpoint_not_found", f"names checkpoint {checkpoint!r} of {job_id}; {has}."
