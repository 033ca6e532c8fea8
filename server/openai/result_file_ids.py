"""The ids of result files, which are derived from their job: its metrics, and its final checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.job import Job

ResultKind = Literal["metrics", "model"]
_ID = re.compile(r"file-(metrics|model)-([0-9a-z]+)\Z")


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
    return ResultFileId("metrics" if match.group(1) == "metrics" else "model", f"job_{match.group(2)}")


def result_file_ids(job: Job) -> list[str]:
    """The result files of an ended job: none if it was never started, and no model without a final checkpoint."""
    results = [ResultFileId("metrics", job.id)] if job.attempt else []
    if job.final_checkpoint is not None:
        results.append(ResultFileId("model", job.id))
    return [result.text for result in results]
