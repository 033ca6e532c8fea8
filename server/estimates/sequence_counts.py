"""Finds the number of sequences per epoch from an earlier job of the project that counted the same data.

Data is the same if it was uploaded with the same bytes, is built in, or is a commit on the Hub; the contents of a path
or a branch may have changed. The earlier job need not have succeeded, because it counts before its first step.
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
from zeta_core.contract.spec.defaults import global_batch, is_from_scratch, resolve, split_micro_batch
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.resolved_spec import ResolvedSpec, UploadedFile
from zeta_core.contract.spec.sources import BuiltinSource, DatasetSource, FileSource, HubSource, dataset_sources

# These options are compared by what they refer to, or only where they matter; all others are compared by value.
_COMPARED_SEPARATELY = frozenset({"model", "dataset", "tokenizer", "seq_len", "seed"})
COMPARED_OPTIONS = tuple(name for name in options_affecting(JobSpec, "sequences") if name not in _COMPARED_SEPARATELY)
_COMMIT = re.compile(r"[0-9a-f]{40}")


async def find_sequence_count(
    session: AsyncSession, project: str, spec: JobSpec, resolved: ResolvedSpec
) -> tuple[str, int] | None:
    """The id of the newest job that counted the same data, and its number of sequences per epoch; or ``None``.

    ``resolved`` is the spec as far as it is known.
    """
    seq_len, identity = resolved.seq_len, _identity(spec, resolved.files)
    if seq_len is None or identity is None:
        return None
    columns = (JobRow.id, JobRow.spec, JobRow.resolved_spec_json)
    newest = select(*columns).where(JobRow.project == project, JobRow.deleted_at.is_(None))
    newest = newest.order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(NEWEST_JOBS)
    for job_id, spec_json, resolved_json in await session.execute(newest):
        earlier_resolved = ResolvedSpec.model_validate(resolved_json)
        if not earlier_resolved.num_sequences or earlier_resolved.seq_len != seq_len:
            continue
        try:
            earlier = JobSpec.model_validate(spec_json)
        except ValidationError:
            continue  # a spec of an earlier version
        if _identity(earlier, earlier_resolved.files) == identity:
            return job_id, earlier_resolved.num_sequences
    return None


def count_steps(num_sequences: int, epochs: float, global_batch_size: int) -> tuple[int, int]:
    """The number of steps and of sequences in all epochs, as `zeta_core.plan.with_length` counts them."""
    sequences = max(1, round(epochs * num_sequences))
    return math.ceil(sequences / global_batch_size), sequences


def default_global_batch(num_sequences: int, spec: JobSpec) -> int:
    """The default global batch, as `zeta_core.plan.decide_plan` chooses it, if ``batch_size`` is unset."""
    processes, accumulate = spec.resources.num_processes or 1, spec.gradient_accumulate_every
    batch = global_batch(num_sequences, processes, from_scratch=is_from_scratch(spec.model))
    return batch if accumulate is None else split_micro_batch(batch, accumulate, processes) * accumulate * processes


def has_fixed_content(source: DatasetSource) -> bool:
    """Whether the source always has the same contents: an upload, a built-in data set, or a commit of the Hub."""
    if isinstance(source, HubSource):
        return source.revision is not None and _COMMIT.fullmatch(source.revision) is not None
    return isinstance(source, FileSource | BuiltinSource)


def _identity(spec: JobSpec, files: Mapping[str, UploadedFile]) -> list[Any] | None:
    """Equal for two specs that produce the same sequences from the same data; ``None`` if that is unknown."""
    sources: list[Any] = []
    for source in dataset_sources(spec.dataset):
        fields = source.model_dump(mode="json")
        if isinstance(source, FileSource):
            fields["file"] = [_file_identity(file_id, files) for file_id in source.file_ids]
        elif not has_fixed_content(source):
            return None
        sources.append(fields)
    requested = resolve(spec)
    seed = requested.seed if spec.eval_split else None  # it decides what is held out
    return [sources, _tokenizer(requested, files), seed, *(requested.value(name) for name in COMPARED_OPTIONS)]


def _file_identity(file_id: str, files: Mapping[str, UploadedFile]) -> list[str]:
    """The hash of an uploaded file, and the suffix of its name, which determines its format."""
    file = files.get(file_id)
    if file is None:
        return [file_id, ""]
    return [file.sha256 or file_id, PurePath(file.filename).suffix.lower()]


def _tokenizer(requested: ResolvedSpec, files: Mapping[str, UploadedFile]) -> Any:
    """The tokenizer in the spec, else the model with its own tokenizer; a model from scratch uses bytes."""
    named = requested.value("tokenizer") or requested.model
    if isinstance(named, dict):
        if "config" in named or "builtin" in named:
            return "bytes"
        if "file" in named:
            return _file_identity(str(named["file"]), files)
    return named
