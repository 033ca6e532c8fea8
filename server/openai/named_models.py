"""Adds, lists and removes the names that a project has given to base models."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from server.auth import Caller
from server.database.nul_characters import replace_nul
from server.database.tables import ModelNameRow
from server.openai.model_names import ANY_DATASET
from server.service import Service
from server.submitting.references import check_references
from zeta_core.contract.errors import Conflict, ErrorDetail, InvalidSpec, NotFound
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.responses import DeletedObject, Page
from zeta_core.contract.model_names import ModelName, NewModelName
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.validation import error_from_details, parse, shown

MAX_NAMES = 1000  # per project; the list has no pages
_DETERMINED_BY_THE_JOB = ("model", "dataset", "eval_dataset", "resume_from_checkpoint", "metadata")


async def add(service: Service, caller: Caller, body: Any) -> ModelName:
    """Name a base model in the caller's project.

    Raises `InvalidSpec` naming every invalid field, and `Conflict` if the name exists or there are `MAX_NAMES`.
    """
    new = parse(NewModelName, body)
    details = [
        ErrorDetail(
            param=f"defaults.{name}",
            message=f"defaults.{name} can't be set, because each job determines it; omit it.",
            code="invalid_value",
        )
        for name in _DETERMINED_BY_THE_JOB
        if name in new.defaults
    ]
    if details:
        raise error_from_details(details)
    model = new.model if isinstance(new.model, str) else new.model.model_dump(mode="json", exclude_unset=True)
    spec = {**new.defaults, "model": model}
    row = ModelNameRow(project=caller.project, name=new.name, created_by=caller.key_id, spec=spec, created_at=utc_now())
    try:
        parsed = parse(JobSpec, {**spec, "dataset": ANY_DATASET})
        async with service.database.write() as session:
            await check_references(session, service, caller, parsed)
            if await session.get(ModelNameRow, (caller.project, new.name)) is not None:
                raise _name_exists(new.name)
            in_project = select(func.count()).where(ModelNameRow.project == caller.project)
            if (await session.scalar(in_project) or 0) >= MAX_NAMES:
                raise Conflict(
                    f"The project has {MAX_NAMES} model names, the limit; remove one with `zeta models remove NAME`.",
                    code="too_many_model_names",
                )
            session.add(row)
            session.add(caller.audit_row("model.add", new.name, project=caller.project))
    except InvalidSpec as error:
        raise error_from_details([_in_defaults(detail) for detail in error.details]) from error
    except IntegrityError as error:  # another request added the name at the same time
        raise _name_exists(new.name) from error
    return _to_model_name(row)


async def list_names(service: Service, caller: Caller) -> Page[ModelName]:
    """The names of the project and of the settings, sorted; a project's name hides an equal one of the settings."""
    async with service.database.read() as session:
        query = select(ModelNameRow).where(ModelNameRow.project == caller.project).limit(MAX_NAMES)
        named = {row.name: _to_model_name(row) for row in await session.scalars(query)}
    settings = {
        name: ModelName(name=name, model=_json(source), origin="settings")
        for name, source in service.settings.openai_base_models.items()
    }
    names = settings | named
    data = [names[name] for name in sorted(names)]
    return Page(data=data, first_id=data[0].name if data else None, last_id=data[-1].name if data else None)


async def remove(service: Service, caller: Caller, name: str) -> DeletedObject:
    """Remove a name; its jobs and models stay. Raises `NotFound`, also for a name of the settings."""
    async with service.database.write() as session:
        row = await session.get(ModelNameRow, (caller.project, replace_nul(name)))
        if row is None:
            origin = " It is set by ZETA_OPENAI_MODELS." if name in service.settings.openai_base_models else ""
            raise NotFound(
                f"The project has no model name {shown(name)}; list them with `zeta models list`.{origin}",
                code="model_not_found",
            )
        await session.delete(row)
        session.add(caller.audit_row("model.remove", name, project=caller.project))
    return DeletedObject(id=name, object="model_name")


def _name_exists(name: str) -> Conflict:
    return Conflict(
        f"The model name {name!r} exists; remove it first with `zeta models remove {name}`.", code="model_name_exists"
    )


def _in_defaults(detail: ErrorDetail) -> ErrorDetail:
    """A fault in the spec, with the name that its field has in the request."""
    if detail.param is None or detail.param.partition(".")[0] == "model":
        return detail
    param = f"defaults.{detail.param}"
    message = detail.message.replace(detail.param, param, 1)
    return ErrorDetail(param=param, message=message, code=detail.code, suggestion=detail.suggestion)


def _to_model_name(row: ModelNameRow) -> ModelName:
    defaults = {name: value for name, value in row.spec.items() if name != "model"}
    return ModelName(
        name=row.name, model=row.spec["model"], defaults=defaults, origin="project", created_at=row.created_at
    )


def _json(source: Any) -> Any:
    return source if isinstance(source, str) else source.model_dump(mode="json", exclude_unset=True)
