"""The results of a batch while it runs: one line for each answered request, in the order in which they ended.

A checkpoint contains the output file and the error file, in the order of the requests. ``step-N`` has N results, and
`ROWS_FILE` lists their requests, so the next attempt answers only the others. ``final`` has all of them. Of an attempt
that was killed, only the results up to its last checkpoint count, so no request is lost, and none has two results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict

from zeta_core.contract.openai.batch_files import ERROR_FILE, OUTPUT_FILE

RESULTS_FILE = "results.jsonl"  # in the run directory: the results in the order in which they ended
ROWS_FILE = "rows.jsonl"  # in `step-N`: one line for each result, in the order of the requests


class ResultCounts(BaseModel):
    """The numbers of results and of their tokens."""

    model_config = ConfigDict(frozen=True)

    num_answered: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def num_results(self) -> int:
        return self.num_answered + self.num_failed


@dataclass(frozen=True)
class _Position:
    """Where the line of a result is in the file."""

    start: int
    num_bytes: int
    is_failure: bool


class Results:
    """The results in a file of the run directory, which this process appends to."""

    def __init__(self, path: Path) -> None:
        """Create the file ``path``, without results. Raises `OSError`."""
        self.counts = ResultCounts()
        self._path = path
        self._file: BinaryIO = path.open("w+b")
        self._positions: dict[int, _Position] = {}  # by row

    def __contains__(self, row: int) -> bool:
        return row in self._positions

    def close(self) -> None:
        self._file.close()

    def add(self, row: int, line: bytes, *, is_failure: bool, prompt_tokens: int, completion_tokens: int) -> None:
        """Add the line of the output file or, for a failure, of the error file. Raises `OSError`."""
        assert row not in self._positions, f"request {row} has a result"
        head = {"row": row, "failed": is_failure, "tokens": [prompt_tokens, completion_tokens]}
        self._append(row, json.dumps(head).encode() + b"\t" + line, is_failure, prompt_tokens, completion_tokens)

    def load(self, checkpoint: Path) -> None:
        """Continue with the results of an earlier attempt."""
        rows, output, errors = (checkpoint / name for name in (ROWS_FILE, OUTPUT_FILE, ERROR_FILE))
        with rows.open("rb") as heads, output.open("rb") as answers, errors.open("rb") as failures:
            for head in heads:
                read = json.loads(head)
                line = (failures if read["failed"] else answers).readline()
                self._append(read["row"], head.rstrip() + b"\t" + line, read["failed"], *read["tokens"])

    def write_partial(self, folder: Path) -> None:
        """Write the results into the folder of a checkpoint ``step-N``. Raises `OSError`."""
        with (folder / ROWS_FILE).open("wb") as rows:
            self._write(folder, rows)

    def write_final(self, folder: Path) -> None:
        """Write the results into the folder of the checkpoint ``final``. Raises `OSError`."""
        self._write(folder, None)

    def _write(self, folder: Path, rows: BinaryIO | None) -> None:
        with (folder / OUTPUT_FILE).open("wb") as output, (folder / ERROR_FILE).open("wb") as errors:
            for position, head, line in self._sorted_entries():
                (errors if position.is_failure else output).write(line)
                if rows is not None:
                    rows.write(head + b"\n")

    def _append(self, row: int, entry: bytes, is_failure: bool, prompt_tokens: int, completion_tokens: int) -> None:
        start = self._file.tell()
        self._file.write(entry)
        self._positions[row] = _Position(start, len(entry), is_failure)
        counts = self.counts
        self.counts = ResultCounts(
            num_answered=counts.num_answered + (not is_failure),
            num_failed=counts.num_failed + is_failure,
            prompt_tokens=counts.prompt_tokens + prompt_tokens,
            completion_tokens=counts.completion_tokens + completion_tokens,
        )

    def _sorted_entries(self) -> Iterator[tuple[_Position, bytes, bytes]]:
        """The position, the head and the line of each result, in the order of the requests."""
        self._file.flush()
        with self._path.open("rb") as file:
            for _, position in sorted(self._positions.items()):
                file.seek(position.start)
                head, _, line = file.read(position.num_bytes).partition(b"\t")
                yield position, head, line
