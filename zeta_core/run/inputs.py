"""Reading the inputs of a run: its model and tokenizer, its data as tokens, and the checkpoint to resume from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any

import torch
from pydantic import JsonValue

from zeta_core.checkpoint import checkpoint_files
from zeta_core.checkpoint.checkpoint_files import Checkpoint
from zeta_core.checkpoint.training_state import StoredState, read_training_state
from zeta_core.contract.data_files.data_folder import Split
from zeta_core.contract.spec import defaults
from zeta_core.contract.spec.sources import Dataset, dataset_sources
from zeta_core.data.encode import is_bytes
from zeta_core.data.row_check import check_rows
from zeta_core.data.sources import open_sources
from zeta_core.data.template import set_template
from zeta_core.data.token_cache import prepare_tokens
from zeta_core.data.tokens import TokenFile
from zeta_core.environment import Place
from zeta_core.failures import CannotTrain
from zeta_core.memory.before_loading import check_before_loading
from zeta_core.model.folders import IgnoredCode
from zeta_core.model.quantized import require as require_bitsandbytes
from zeta_core.model.sources import Located, locate_model, locate_tokenizer
from zeta_core.parallel.processes import Processes
from zeta_core.report.journal import Report
from zeta_core.report.trackers import require as require_trackers
from zeta_core.run.request import Run

# Data of this size is checked before it is tokenized, which takes several times as long and would find a fault late.
LARGE_DATA_BYTES = 16 << 20
MOST_CHECK_SECONDS = 120.0


@dataclass(frozen=True)
class Inputs:
    """The inputs before the model is built; ``held_out`` contains the tokens of an ``eval_dataset``.

    ``started_on`` is the day on which the run was started first, which is the date that chat templates render.
    """

    located: Located
    tokenizer: Any
    tokens: TokenFile
    held_out: TokenFile | None
    started_on: date

    @property
    def largest_id(self) -> int:
        return max(data.largest_id for data in (self.tokens, self.held_out) if data is not None)


def tokenizer_of_data(run: Run, inputs: Inputs) -> Any:
    """The tokenizer that the ids of the data belong to; None for pre-tokenized data whose tokenizer was not named."""
    named = run.tokenizer is not None or run.options.tokenizer is not None or not is_bytes(inputs.tokenizer)
    return inputs.tokenizer if named or not run.options.use_pretokenized else None


def read(run: Run, place: Place, report: Report) -> Inputs:
    """Locate the model and its tokenizer, and tokenize the data. Raises if a requested package is missing."""
    options = run.options
    require_trackers(options.report_to)
    if run.quantizes:
        require_bitsandbytes()
    report.phase("loading_data")
    if run.resume_from is None:  # a resumed run passed this check when it started
        check_before_loading(run.model, options, run.places, run.cache, world_size=place.world_size)
    ignored: list[IgnoredCode] = []
    located = locate_model(run.model, run.places, run.cache, on_ignored=ignored.append)
    wanted = run.tokenizer if run.tokenizer is not None else options.tokenizer
    tokenizer = locate_tokenizer(wanted, located, run.places, run.cache, on_ignored=ignored.append)
    _warn_of_ignored_code(ignored, report)
    set_template(tokenizer, options.chat_template)
    day = _started_on(run)
    tokens = _tokens(run, options.dataset or defaults.DATASET, tokenizer, day, place, report)
    held_out = None
    if options.eval_dataset is not None:
        held_out = _tokens(run, options.eval_dataset, tokenizer, day, place, report, split="held_out")
    if options.chat_template is not None and not (tokens.is_templated or (held_out and held_out.is_templated)):
        raise CannotTrain("chat_template is set, but the data contains no conversations; leave it out.")
    return Inputs(located, tokenizer, tokens, held_out, day)


def _started_on(run: Run) -> date:
    """The day on which the run was started first. A resumed run continues with that day."""
    stored = {} if run.resume_from is None else checkpoint_files.stored_plan(run.resume_from)
    if stored.get("template_date"):
        return date.fromisoformat(stored["template_date"])
    return run.started_on or datetime.now(UTC).date()


def _group_by(run: Run) -> str | None:
    """The column of the groups that are held out together; a resumed run continues with the stored one."""
    stored = {} if run.resume_from is None else checkpoint_files.stored_plan(run.resume_from)
    return run.options.group_by or stored.get("group_by")


def _warn_of_ignored_code(ignored: list[IgnoredCode], report: Report) -> None:
    for code in {each.model: each for each in ignored}.values():  # model and tokenizer may be the same repository
        keys: dict[str, JsonValue] = {file: list(names) for file, names in code.keys.items()}
        report.warn("model_code_ignored", code.message, evidence={"model": code.model, "keys": keys})


def _tokens(
    run: Run,
    dataset: Dataset,
    tokenizer: Any,
    today: date,
    place: Place,
    report: Report,
    *,
    split: Split = "train",
) -> TokenFile:
    sources = open_sources(
        dataset_sources(dataset),
        run.places,
        pretokenized=run.options.use_pretokenized,
        method=run.options.method,
        split=split,
        on_folder=report.log,
    )
    if split == "train":
        group_by = _group_by(run)
        sources = [replace(source, group_by=group_by) for source in sources]
    is_flat = any(source.flat is not None for source in sources)
    if place.is_main and not is_flat and sum(source.num_bytes for source in sources) >= LARGE_DATA_BYTES:
        check_rows(
            [source.with_format() for source in sources],
            tokenizer,
            run.cache,
            train_on=run.options.train_on,
            method=run.options.method,
            today=today,
            seconds=MOST_CHECK_SECONDS,
        )
    return prepare_tokens(
        sources,
        tokenizer,
        run.cache,
        report,
        train_on=run.options.train_on,
        method=run.options.method,
        today=today,
        processes=torch.get_num_threads() * place.world_size,
    )


@dataclass(frozen=True)
class Earlier:
    """The checkpoint to resume from, and its stored state besides the weights."""

    checkpoint: Checkpoint
    state: StoredState

    @property
    def plan(self) -> dict[str, Any]:
        return self.state.plan


def find_earlier(run: Run, processes: Processes, report: Report) -> Earlier | None:
    """The checkpoint to resume from, which the first rank chooses and every rank reads; None for a new run."""
    found = processes.from_main(lambda: _find_checkpoint(run, report))
    return None if found is None else Earlier(found, read_training_state(found.directory))


def _find_checkpoint(run: Run, report: Report) -> Checkpoint | None:
    if run.resume_from is None:
        return None
    found = checkpoint_files.find(run.resume_from, run.output_dir, report.warn)
    if found is None:
        report.warn(
            "no_checkpoint_yet", f"{run.output_dir} has no checkpoint yet, so the run starts from the beginning."
        )
    return found
