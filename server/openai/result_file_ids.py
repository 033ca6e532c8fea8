"""The ids of result files, which are derived from their job.

A training has its metrics and its final checkpoint, and a batch its answers and its errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from server.openai.batch_results import BatchResults
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.kind import JobKind

ResultKind = Literal["metrics", "model", "output", "errors"]
_KINDS: dict[str, ResultKind] = {kind: kind for kind in get_args(ResultKind)}
_ID = re.compile(rf"file-({'|'.join(_KINDS)})-([0-9a-z]+)\Z")


@dataclass(frozen=True)
class ResultFileId:
    kind: ResultKind
    job_id: str

    @property
    def text(self) -> str:
        return f"file-{self.kind}-{self.job_id.removeprefix('job_')}"


def parse_result_file_id(text: str) -> ResultFileId | None:
    """The kind and the job of a result file; ``None`` for any other text."""
    match = _ID.match(text)
    if match is None or not is_id(f"job_{match.group(2)}", "job"):
        return None
    return ResultFileId(_KINDS[match.group(1)], f"job_{match.group(2)}")


def result_file_ids(job: Job, results: BatchResults | None = None) -> list[str]:
    """The result files of an ended job: none if it was never started, and no model without a final checkpoint.

    ``results`` are those of a batch.
    """
    if job.kind is JobKind.BATCH:
        return [file_id for file_id in batch_file_ids(job.id, results) if file_id is not None]
    if job.kind is not JobKind.TRAINING:
        return []
    found = [ResultFileId("metrics", job.id)] if job.attempt else []
    if job.final_checkpoint is not None:
        found.append(ResultFileId("model", job.id))
    return [result.text for result in found]


def batch_file_ids(batch_id: str, results: BatchResults | None) -> tuple[str | None, str | None]:
    """The output file and the error file of an ended batch; ``None`` for one that would be empty."""
    if results is None:
        return None, None
    output = ResultFileId("output", batch_id).text if results.num_answered else None
    return output, ResultFileId("errors", batch_id).text if results.num_failed else None
