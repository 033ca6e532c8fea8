"""Validates a spec and resolves its defaults, both for submission and for validation."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.http.bodies import INLINE_BYTES
from server.service import Service
from server.submitting.quotas import check_field_limits
from server.submitting.references import check_references, check_training_state, inputs_of_export, resolve_latest
from server.submitting.resuming import check_exact_resume, find_device_kind
from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.secret_texts import find_secrets, may_contain_secrets
from zeta_core.contract.spec.export_spec import ExportSpec
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.kinds import SPEC_MODELS, AnySpec, resolve
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.spec.resources import elastic_faults
from zeta_core.contract.spec.validation import MAX_DETAILS, error_from_details, parse


@dataclass(frozen=True)
class AcceptedSpec:
    """A valid spec with ``latest`` resolved to a checkpoint, and the resolved spec with defaults and its files."""

    spec: AnySpec
    resolved_spec: ResolvedSpec


async def read_any_spec(service: Service, caller: Caller, kind: JobKind, body: Any) -> AnySpec:
    """The spec of a job of this kind; see `read_spec`."""
    if kind is JobKind.TRAINING:
        return await read_spec(service, caller, body)
    _reject_secrets(body)
    spec = parse(SPEC_MODELS[kind], body)
    check_field_limits(spec, caller.limits)
    return spec


async def read_spec(service: Service, caller: Caller, body: Any) -> JobSpec:
    """Check the fields and the files in the artifact store, before the transaction. Raises `InvalidSpec`."""
    spec = _parse(body) if len(json.dumps(body)) <= INLINE_BYTES else await asyncio.to_thread(_parse, body)
    check_field_limits(spec, caller.limits)
    await check_training_state(service, caller, spec)
    return spec


def _parse(body: Any) -> JobSpec:
    _reject_secrets(body)
    return parse(JobSpec, body)


def _reject_secrets(body: Any) -> None:
    """Raise `InvalidSpec` if the body contains secrets: a spec is stored, and shown to everyone in the project."""
    if not may_contain_secrets(json.dumps(body)):
        return
    details = [
        ErrorDetail(
            param=path,
            message=f"{path} contains {kind}. A spec is stored and shown to everyone in the project, so remove it; "
            "workers pass the variables in ZETA_JOB_ENV to jobs.",
            code="secret_in_spec",
        )
        for path, kind in islice(find_secrets(body), MAX_DETAILS)
    ]
    if details:
        raise error_from_details(details)


async def accept(session: AsyncSession, service: Service, caller: Caller, spec: AnySpec) -> AcceptedSpec:
    """Check and lock the rows that the spec refers to, inside the transaction. Raises `InvalidSpec`."""
    files = await check_references(session, service, caller, spec)
    held_out = None
    if isinstance(spec, ExportSpec):
        files, held_out = await inputs_of_export(session, spec)
    spec = await resolve_latest(session, spec)
    resolved = resolve(spec).model_copy(update={"files": files})
    if held_out is not None:
        resolved = resolved.updated(ResolvedSpec.model_validate({"held_out": held_out.model_dump(mode="json")}))
    if isinstance(spec, JobSpec):
        faults = list(elastic_faults(spec.resources, spec.elastic, resolved.global_batch_size))
        if faults:
            raise error_from_details(faults)
    if isinstance(spec, JobSpec) and spec.resume_from_checkpoint is not None:
        await check_exact_resume(session, spec)
        device_kind = await find_device_kind(session, spec.resume_from_checkpoint)
        resolved = resolved.model_copy(update={"device_kind": device_kind})
    return AcceptedSpec(spec, resolved)
