"""Checking the rows of opened sources before a run, in seconds: all rows are read, and a sample is tokenized.

Every row is decoded, and its columns, roles and values are checked. Rendering and tokenizing take longer, so they are
done for the first rows, for rows from the whole data, and for each row with a turn that no earlier row has (by its
role, fields, neighbours, and whether it is empty). A run uses the same code, so its messages are the same.

A flat file of ids is read as a whole.

Guarantees: rows are only read in a sandboxed process (`zeta_core.data.sandbox`). All faulty rows are reported, up to
`MAX_ERRORS`, in the order of the data. Results of the whole data are cached in ``<cache>/rows-<hash>.json``, under the
content of the data, the tokenizer, and the options that matter; errors are cached, too.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, date, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.sources import Dataset, DatasetSource, HubSource, PathSource, dataset_sources
from zeta_core.data.documents.conversations import TrainOn
from zeta_core.data.row_check.row_pass import MAX_ERRORS, MAX_LENGTHS, CheckedRows, RowPass
from zeta_core.data.rows.token_rows import MaskPresence
from zeta_core.data.sandbox import Position, ProcessLimits, Sandbox, send_message
from zeta_core.data.sources import Source, SourceLocations, open_sources
from zeta_core.data.tokens.cache import fingerprint, make_encoder, no_trained_token_error, reject_for_flat
from zeta_core.data.tokens.encoder import Encoder
from zeta_core.data.tokens.flat_files import IdType, OutOfTime, flat_tokens
from zeta_core.data.tokens.parallel_encoding import num_processes
from zeta_core.environment import variables
from zeta_core.failures import InvalidData
from zeta_core.report.reporter import Reporter
from zeta_core.system.data_folder import Split

VERSION = 5  # of the results in the cache
MAX_PROCESSES = 4  # because jobs run on the same machine
BYTES_PER_PROCESS = 4 << 20
MAX_COLUMNS = 100

DataField = Literal["dataset", "eval_dataset"]


def check_dataset(
    name: DataField,
    spec: JobSpec,
    dataset: Dataset,
    locations: SourceLocations,
    tokenizer: Any,
    cache: Path,
    *,
    seconds: float,
) -> CheckedRows | str:
    """Check the rows of a field of the spec, or return the reason why they are not checked. Raises `InvalidData`."""
    split: Split = "train" if name == "dataset" else "held_out"
    try:
        if reason := _why_unchecked(dataset_sources(dataset), locations):
            return reason
        sources = open_sources(
            dataset_sources(dataset), locations, pretokenized=spec.use_pretokenized, method=spec.method, split=split
        )
        group_by = spec.group_by if split == "train" else None
        sources = [replace(source, group_by=group_by) for source in sources]
        if any(source.flat is not None for source in sources):
            return _check_flat(sources, train_on=spec.train_on, method=spec.method, seconds=seconds)
        return check_rows(
            [source.with_format() for source in sources],
            tokenizer,
            cache,
            train_on=spec.train_on,
            method=spec.method,
            today=datetime.now(UTC).date(),
            seconds=seconds,
        )
    except InvalidData as error:
        param = error.param or name
        details = [detail.model_copy(update={"param": param}) for detail in error.details]
        raise InvalidData(error.message, hint=error.hint, code=error.code, param=param, details=details) from error


def _check_flat(sources: list[Source], *, train_on: TrainOn | None, method: str, seconds: float) -> CheckedRows | str:
    """Check a flat file of ids: its header, type, size, and all ids. Raises `InvalidData`."""
    reject_for_flat(sources, train_on=train_on, method=method)
    try:
        tokens = flat_tokens(sources, Reporter(), time.monotonic() + seconds)
    except OutOfTime:
        return "The flat file of ids could not be read within the time limit; the run checks it when it starts."
    lengths = np.diff(tokens.offsets)
    some = {*range(0, len(lengths), -(-len(lengths) // MAX_LENGTHS)), int(lengths.argmax())}
    num_tokens, num_documents = len(tokens.ids), len(lengths)
    return CheckedRows(
        rows=num_documents,
        sampled_rows=num_documents,
        sampled_tokens=num_tokens,
        trained_tokens=num_tokens - num_documents,
        tokens=num_tokens,
        largest_id=tokens.largest_id,
        formats=["tokens"],
        lengths=lengths[sorted(some)].tolist(),
        id_type=IdType.of(tokens),
    )


def _why_unchecked(dataset: Sequence[DatasetSource], locations: SourceLocations) -> str:
    if any(isinstance(source, HubSource) for source in dataset):
        return "Data on the Hub is downloaded and checked when training starts."
    if (
        locations.data_root is None
        and not locations.any_path
        and any(isinstance(source, PathSource) for source in dataset)
    ):
        return "The worker that ran the check has no data folder (ZETA_DATA_ROOT), so it could not read the rows."
    return ""


def check_rows(
    sources: Sequence[Source],
    tokenizer: Any,
    cache: Path,
    *,
    train_on: TrainOn | None,
    method: str,
    today: date,
    seconds: float,
) -> CheckedRows:
    """Check the rows of sources with known formats for about ``seconds``.

    Raises `InvalidData` with the first error; ``details`` has all errors in the data, up to `MAX_ERRORS`, if there are
    several.
    """
    encoder = make_encoder(sources, tokenizer, train_on=train_on, method=method, today=today)
    identity = {
        "version": VERSION,
        "tokenizer": fingerprint(tokenizer, today),
        "sources": [[s.name, s.fingerprint, sorted(s.drop_columns), s.at, s.group_by] for s in sources],
        "train_on": train_on,
        "method": method,
    }
    cache_file = cache / f"rows-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.json"
    result = _read(cache_file)
    if result is None:
        with variables(TOKENIZERS_PARALLELISM="false"):  # the tokenizer's threads do not survive a fork
            result = _check(sources, encoder, seconds)
        if result.get("complete", True):
            cache.mkdir(parents=True, exist_ok=True)
            cache_file.write_text(json.dumps(result))
    if errors := result.get("errors"):
        details = [ErrorDetail(message=error["error"], code=error["code"]) for error in errors]
        raise InvalidData(details[0].message, code=details[0].code, details=details if len(details) > 1 else ())
    return CheckedRows(**result)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: object = json.loads(path.read_text())
        path.touch()  # the worker's cache evicts the least recently used entries
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", content) if isinstance(content, dict) else None


def _check(sources: Sequence[Source], encoder: Encoder, seconds: float) -> dict[str, Any]:
    """The result of all processes, or the errors in the data, as stored in the cache."""
    deadline = time.monotonic() + seconds
    if sys.platform != "linux":
        results = [RowPass(sources, encoder, Position(), deadline).run()]
    else:
        processes = num_processes(sources, MAX_PROCESSES, bytes_each=BYTES_PER_PROCESS)
        results = _in_processes(sources, encoder, deadline, processes)
    errors = [error for result in results for error in result.get("errors", ())]
    if errors:
        complete = all(result.get("complete", True) for result in results)
        return {"errors": sorted(errors, key=lambda error: error["unit"])[:MAX_ERRORS], "complete": complete}
    try:
        return asdict(_merged(sources, results))
    except InvalidData as error:
        return {"errors": [{"error": error.message, "code": error.code}]}


def _in_processes(sources: Sequence[Source], encoder: Encoder, deadline: float, processes: int) -> list[dict[str, Any]]:
    """The result of each process, which checks a share of the units."""
    team: list[Sandbox] = []
    limits = ProcessLimits.for_processes(processes)
    with ExitStack() as ending:
        for number in range(processes):

            def work(pipe: Connection, position: Position, number: int = number) -> None:
                check = RowPass(sources, encoder, position, deadline, number, processes)
                send_message(pipe, kind="result", value=check.run())

            team.append(Sandbox(work, limits, name=f"check-rows-{number}", others=team))
            ending.callback(team[-1].close)
        return [_result(member) for member in team]


def _result(process: Sandbox) -> dict[str, Any]:
    """The result of a process. An exceeded limit has no known location in the data, so it counts as the last error.

    It depends on the machine, so it is not cached.
    """
    try:
        return process.receive()["value"]
    except InvalidData as error:
        return {"errors": [{"error": error.message, "code": error.code, "unit": sys.maxsize}], "complete": False}


def _merged(sources: Sequence[Source], results: Sequence[dict[str, Any]]) -> CheckedRows:
    """The results of several processes as one. Raises `InvalidData` if only some rows of a source have a mask."""
    checked = CheckedRows(
        formats=sorted({str(source.row_format) for source in sources}),
        shapes=sorted({source.shape for source in sources if source.shape}),
    )
    columns = [MaskPresence() for _ in sources]
    text_tokens = [0] * len(sources)
    seen = {(kind, source.number): dict[str, None]() for source in sources for kind in ("mapped", "unused")}
    for result in results:
        part = CheckedRows(**result["found"])
        checked.complete &= part.complete
        checked.rows += part.rows
        checked.sampled_rows += part.sampled_rows
        checked.sampled_tokens += part.sampled_tokens
        checked.trained_tokens += part.trained_tokens
        checked.tokens += part.tokens
        checked.largest_id = max(checked.largest_id, part.largest_id)
        checked.untrained_rows += part.untrained_rows
        checked.lengths += part.lengths
        text_tokens = [sum(both) for both in zip(text_tokens, result["text_tokens"], strict=True)]
        for of_source, (rows_with, rows_without) in zip(columns, result["columns"], strict=True):
            of_source.merge(rows_with, rows_without)
        for kind, number, name in result["seen"]:
            seen[kind, number][name] = None
    unused = dict.fromkeys(name for (kind, _), names in seen.items() if kind == "unused" for name in names)
    checked.unused_columns = list(unused)[:MAX_COLUMNS]
    checked.lengths += [length for length in text_tokens if length]
    for source, of_source in zip(sources, columns, strict=True):
        source.check_masks(of_source)
        if checked.complete and all(result["all_seen"] for result in results):
            source.check_columns(seen["mapped", source.number], seen["unused", source.number])
    num_tokens = max(checked.tokens, checked.sampled_tokens)  # an estimate, and the number that was counted
    if checked.complete and (num_tokens < 2 or all(result["blank"] for result in results)):
        masks = dict.fromkeys(name for of_source in columns for name in of_source.masks)
        raise no_trained_token_error(sources, checked.untrained_rows, list(masks))
    return checked
