"""Validates a spec and resolves its defaults, both for submission and for validation."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.http.bodies import INLINE_BYTES
from server.service import Service
from server.submitting.quotas import check_fields
from server.submitting.references import check_references, check_training_state, resolve_latest
from server.submitting.resuming import check_exact_resume, find_device_kind
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.kinds import SPEC_MODELS, AnySpec, resolve
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.spec.validation import parse


@dataclass(frozen=True)
class AcceptedSpec:
    """A valid spec with ``latest`` resolved to a checkpoint, and the resolved spec with defaults and its files."""

    spec: AnySpec
    resolved_spec: ResolvedSpec


async def read_any_spec(service: Service, caller: Caller, kind: JobKind, body: Any) -> AnySpec:
    """The spec of a job of this kind; see `read_spec`."""
    if kind is JobKind.TRAINING:
        return await read_spec(service, caller, body)
    spec = parse(SPEC_MODELS[kind], body)
    check_fields(spec, caller.limits)
    return spec


async def read_spec(service: Service, caller: Caller, body: Any) -> JobSpec:
    """Check the fields and the files in the artifact store, before the transaction. Raises `InvalidSpec`."""
    if len(json.dumps(body)) <= INLINE_BYTES:
        spec = parse(JobSpec, body)
    else:
        spec = await asyncio.to_thread(parse, JobSpec, body)
    check_fields(spec, caller.limits)
    await check_training_state(service, caller, spec)
    return spec


async def accept(session: AsyncSession, service: Service, caller: Caller, spec: AnySpec) -> AcceptedSpec:
    """Check and lock the rows that the spec refers to, inside the transaction. Raises `InvalidSpec`."""
    files = await check_references(session, service, caller.project, spec)
    spec = await resolve_latest(session, spec)
    resolved = resolve(spec).model_copy(update={"files": files})
    if isinstance(spec, JobSpec) and spec.resume_from_checkpoint is not None:
        await check_exact_resume(session, spec)
        device_kind = await find_device_kind(session, spec.resume_from_checkpoint)
        resolved = resolved.model_copy(update={"device_kind": device_kind})
    return AcceptedSpec(spec, resolved)
