"""The earlier job of a project that counted the same data: how many sequences an epoch of it has.

Data is the same where it was uploaded with the same bytes, is built in, or is a commit of the Hub; what a path or a
branch holds may have changed since. Whether the job succeeded does not matter: it counts before its first step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import JobRow
from server.estimates.earlier_jobs import NEWEST_JOBS
from zeta_core.contract.spec.affects import options_affecting
from zeta_core.contract.spec.defaults import global_batch, is_from_scratch, resolve, split_of
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.resolved_spec import ResolvedSpec, UploadedFile
from zeta_core.contract.spec.sources import BuiltinSource, DatasetSource, FileSource, HubSource, dataset_sources

# These are compared by what they refer to, or only where they matter; all others by their values.
_COMPARED_SEPARATELY = frozenset({"model", "dataset", "tokenizer", "seq_len", "seed"})
COMPARED_OPTIONS = tuple(name for name in options_affecting(JobSpec, "sequences") if name not in _COMPARED_SEPARATELY)
_COMMIT = re.compile(r"[0-9a-f]{40}")


async def find_counted(
    session: AsyncSession, project: str, spec: JobSpec, resolved: ResolvedSpec
) -> tuple[str, int] | None:
    """The newest such job and its sequences in an epoch; ``resolved`` is all that is known of the spec."""
    seq_len, wanted = resolved.seq_len, _identity(spec, resolved.files)
    if seq_len is None or wanted is None:
        return None
    columns = (JobRow.id, JobRow.spec, JobRow.resolved_spec_json)
    newest = select(*columns).where(JobRow.project == project, JobRow.deleted_at.is_(None))
    newest = newest.order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(NEWEST_JOBS)
    for job_id, sent, resolved_json in await session.execute(newest):
        decided = ResolvedSpec.model_validate(resolved_json)
        if not decided.num_sequences or decided.seq_len != seq_len:
            continue
        try:
            earlier = JobSpec.model_validate(sent)
        except ValidationError:
            continue  # in the words of an earlier version
        if _identity(earlier, decided.files) == wanted:
            return job_id, decided.num_sequences
    return None


def steps_of(num_sequences: int, epochs: float, global_batch_size: int) -> tuple[int, int]:
    """The steps of all epochs and their number of sequences, as `zeta_core.plan.with_length` counts them."""
    sequences = max(1, round(epochs * num_sequences))
    return math.ceil(sequences / global_batch_size), sequences


def global_batch_of(num_sequences: int, spec: JobSpec) -> int:
    """The default global batch, as `zeta_core.plan.decide` chooses it, if ``batch_size`` is unset."""
    processes, accumulate = spec.resources.num_processes, spec.gradient_accumulate_every
    batch = global_batch(num_sequences, processes, from_scratch=is_from_scratch(spec.model))
    return batch if accumulate is None else split_of(batch, accumulate, processes) * accumulate * processes


def is_fixed(source: DatasetSource) -> bool:
    """Whether the source always has the same contents: an upload, a built-in data set, or a commit of the Hub."""
    if isinstance(source, HubSource):
        return source.revision is not None and _COMMIT.fullmatch(source.revision) is not None
    return isinstance(source, FileSource | BuiltinSource)


def _identity(spec: JobSpec, files: Mapping[str, UploadedFile]) -> list[Any] | None:
    """What two specs have alike that cut the same data into the same sequences; None where that cannot be known."""
    sources: list[Any] = []
    for source in dataset_sources(spec.dataset):
        told = source.model_dump(mode="json")
        if isinstance(source, FileSource):
            told["file"] = [_bytes_of(file_id, files) for file_id in source.file_ids]
        elif not is_fixed(source):
            return None
        sources.append(told)
    requested = resolve(spec)
    seed = requested.seed if spec.eval_split else None  # it decides what is held out
    return [sources, _tokenizer(requested, files), seed, *(requested.value(name) for name in COMPARED_OPTIONS)]


def _bytes_of(file_id: str, files: Mapping[str, UploadedFile]) -> list[str]:
    """An uploaded file by what is in it, and by the ending of its name, which tells how it is read."""
    file = files.get(file_id)
    if file is None:
        return [file_id, ""]
    return [file.sha256 or file_id, PurePath(file.filename).suffix.lower()]


def _tokenizer(requested: ResolvedSpec, files: Mapping[str, UploadedFile]) -> Any:
    """The one that is named, else the model whose own it is; a config from scratch has none, which means bytes."""
    named = requested.value("tokenizer") or requested.model
    if isinstance(named, dict):
        if "config" in named or "builtin" in named:
            return "bytes"
        if "file" in named:
            return _bytes_of(str(named["file"]), files)
    return named
