"""The results of a batch while it runs: one line for each answered request, in the order in which they ended.

A checkpoint ``step-N`` contains the first N results, so the next attempt answers only the other requests. ``final``
contains the output file and the error file, in the order of the requests. Of an attempt that was
killed, only the results up to its last checkpoint count, so no request is lost, and none has two results.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict

from zeta_core.contract.openai.batch_files import ERROR_FILE, OUTPUT_FILE

RESULTS_FILE = "results.jsonl"  # in the run directory and in `step-N`


class Counts(BaseModel):
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
        self.counts = Counts()
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
        with (checkpoint / RESULTS_FILE).open("rb") as file:
            for entry in file:
                head = json.loads(entry.partition(b"\t")[0])
                prompt_tokens, completion_tokens = head["tokens"]
                self._append(head["row"], entry, head["failed"], prompt_tokens, completion_tokens)

    def write_partial(self, folder: Path) -> None:
        """Write the results into the folder of a checkpoint ``step-N``. Raises `OSError`."""
        self._file.flush()
        shutil.copyfile(self._path, folder / RESULTS_FILE)

    def write_final(self, folder: Path) -> None:
        """Write the output file and the error file into the folder of the checkpoint ``final``. Raises `OSError`."""
        with (folder / OUTPUT_FILE).open("wb") as output, (folder / ERROR_FILE).open("wb") as errors:
            for position, line in self._sorted_lines():
                (errors if position.is_failure else output).write(line)

    def _append(self, row: int, entry: bytes, is_failure: bool, prompt_tokens: int, completion_tokens: int) -> None:
        start = self._file.tell()
        self._file.write(entry)
        self._positions[row] = _Position(start, len(entry), is_failure)
        counts = self.counts
        self.counts = Counts(
            num_answered=counts.num_answered + (not is_failure),
            num_failed=counts.num_failed + is_failure,
            prompt_tokens=counts.prompt_tokens + prompt_tokens,
            completion_tokens=counts.completion_tokens + completion_tokens,
        )

    def _sorted_lines(self) -> Iterator[tuple[_Position, bytes]]:
        self._file.flush()
        with self._path.open("rb") as file:
            for _, position in sorted(self._positions.items()):
                file.seek(position.start)
                yield position, file.read(position.num_bytes).partition(b"\t")[2]
