"""The warning about a training file with fewer examples than OpenAI requires."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice

from server.artifacts import Artifacts
from server.database.file_tables import FileRow
from zeta_core.contract.data_files.file_types import LINE_SUFFIXES, FileType, file_type
from zeta_core.contract.job.events import WarningLine

MIN_EXAMPLES = 10


async def few_examples_warning(artifacts: Artifacts, files: Sequence[FileRow]) -> WarningLine | None:
    """The warning if the first file, which is the training file, is uncompressed JSON Lines with too few rows."""
    training = files[0]
    if file_type(training.filename) not in [FileType(suffix) for suffix in LINE_SUFFIXES]:
        return None
    num_rows = await asyncio.to_thread(_count_rows, artifacts, training.id)
    if num_rows >= MIN_EXAMPLES:
        return None
    rows = "1 example" if num_rows == 1 else f"{num_rows} examples"
    return WarningLine(
        code="few_examples",
        message=f"training_file has {rows}; OpenAI requires at least {MIN_EXAMPLES}, and few examples teach little.",
        hint="Add examples; 50 to 100 are a good start.",
    )


def _count_rows(artifacts: Artifacts, file_id: str) -> int:
    """The number of lines with content, at most `MIN_EXAMPLES`."""
    with artifacts.open_file(file_id) as file:
        return sum(1 for _ in islice((line for line in file if line.strip()), MIN_EXAMPLES))
