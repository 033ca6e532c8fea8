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
from zeta_core.contract.spec import defaults
from zeta_core.contract.spec.sources import Dataset, dataset_sources
from zeta_core.contract.wire.run_directory import MANIFEST_NAME
from zeta_core.data.documents.template import set_template
from zeta_core.data.row_check import check_rows
from zeta_core.data.sources import open_sources
from zeta_core.data.tokens import TokenFile, prepare_tokens
from zeta_core.data.tokens.encoder import is_bytes
from zeta_core.environment import ProcessRank
from zeta_core.failures import CannotTrain, TrainingFailed
from zeta_core.memory.limits import check_before_loading
from zeta_core.model.continued_adapter import continued
from zeta_core.model.folders import IgnoredCode
from zeta_core.model.located_model import LocatedModel
from zeta_core.model.quantization import require_bitsandbytes
from zeta_core.model.sources import locate_model
from zeta_core.model.tokenizer import locate_tokenizer
from zeta_core.parallel.processes import Processes
from zeta_core.plan import Plan
from zeta_core.report.reporter import Reporter
from zeta_core.report.trackers import require as require_trackers
from zeta_core.run.request import RunRequest
from zeta_core.system.data_folder import Split

# Data of at least this size is checked first, because tokenizing takes several times as long and finds errors late.
LARGE_DATA_BYTES = 16 << 20
MAX_CHECK_SECONDS = 120.0


@dataclass(frozen=True)
class Inputs:
    """The inputs before the model is built; ``held_out`` contains the tokens of an ``eval_dataset``.

    ``started_on`` is the day on which the run was first started, which is the date that chat templates render.
    """

    located: LocatedModel
    tokenizer: Any
    tokens: TokenFile
    held_out: TokenFile | None
    started_on: date

    @property
    def largest_id(self) -> int:
        return max(data.largest_id for data in (self.tokens, self.held_out) if data is not None)


def tokenizer_of_data(request: RunRequest, inputs: Inputs) -> Any:
    """The tokenizer that the ids of the data belong to; None for pre-tokenized data whose tokenizer was not named."""
    named = request.tokenizer is not None or request.options.tokenizer is not None or not is_bytes(inputs.tokenizer)
    return inputs.tokenizer if named or not request.options.use_pretokenized else None


def read(request: RunRequest, rank: ProcessRank, report: Reporter) -> Inputs:
    """Locate the model and its tokenizer, and tokenize the data. Raises if a requested package is missing."""
    options = request.options
    require_trackers(options.report_to)
    if request.quantizes:
        require_bitsandbytes()
    report.phase("loading_data")
    if request.resume_from is None:  # a resumed run passed this check when it started
        check_before_loading(request.model, options, request.locations, request.cache, world_size=rank.world_size)
    ignored: list[IgnoredCode] = []
    located = locate_model(request.model, request.locations, request.cache, on_ignored=ignored.append)
    if request.continues_adapter:
        located = continued(located, options)
    tokenizer_source = request.tokenizer if request.tokenizer is not None else options.tokenizer
    tokenizer = locate_tokenizer(tokenizer_source, located, request.locations, request.cache, on_ignored=ignored.append)
    _warn_of_ignored_code(ignored, report)
    set_template(tokenizer, options.chat_template)
    day = _started_on(request)
    tokens = _read_dataset(request, options.dataset or defaults.DATASET, tokenizer, day, rank, report)
    held_out = None
    if options.eval_dataset is not None:
        held_out = _read_dataset(request, options.eval_dataset, tokenizer, day, rank, report, split="held_out")
    if options.chat_template is not None and not (tokens.is_templated or (held_out and held_out.is_templated)):
        raise CannotTrain("chat_template is set, but the data contains no conversations; remove it.")
    return Inputs(located, tokenizer, tokens, held_out, day)


def _started_on(request: RunRequest) -> date:
    """The day on which the run was first started. A resumed run continues with that day."""
    stored = {} if request.resume_from is None else checkpoint_files.read_plan(request.resume_from)
    if stored.get("template_date"):
        return date.fromisoformat(stored["template_date"])
    return request.started_on or datetime.now(UTC).date()


def _group_by(request: RunRequest) -> str | None:
    """The column of the groups that are held out together; a resumed run continues with the stored one."""
    stored = {} if request.resume_from is None else checkpoint_files.read_plan(request.resume_from)
    return request.options.group_by or stored.get("group_by")


def _warn_of_ignored_code(ignored: list[IgnoredCode], report: Reporter) -> None:
    for code in {each.model: each for each in ignored}.values():  # model and tokenizer may be the same repository
        keys: dict[str, JsonValue] = {file: list(names) for file, names in code.keys.items()}
        report.warn("model_code_ignored", code.message, evidence={"model": code.model, "keys": keys})


def _read_dataset(
    request: RunRequest,
    dataset: Dataset,
    tokenizer: Any,
    today: date,
    rank: ProcessRank,
    report: Reporter,
    *,
    split: Split = "train",
) -> TokenFile:
    """Stages 1 to 4 of the data pipeline (`zeta_core.data`): open the sources, check large data, and tokenize it."""
    sources = open_sources(
        dataset_sources(dataset),
        request.locations,
        pretokenized=request.options.use_pretokenized,
        method=request.options.method,
        split=split,
        on_folder=report.log,
    )
    if split == "train":
        group_by = _group_by(request)
        sources = [replace(source, group_by=group_by) for source in sources]
    is_flat = any(source.flat is not None for source in sources)
    if rank.is_main and not is_flat and sum(source.num_bytes for source in sources) >= LARGE_DATA_BYTES:
        check_rows(
            [source.with_format() for source in sources],
            tokenizer,
            request.cache,
            train_on=request.options.train_on,
            method=request.options.method,
            today=today,
            seconds=MAX_CHECK_SECONDS,
        )
    return prepare_tokens(
        sources,
        tokenizer,
        request.cache,
        report,
        train_on=request.options.train_on,
        method=request.options.method,
        today=today,
        processes=torch.get_num_threads() * rank.ranks_per_node,
    )


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint to resume from, and its stored state besides the weights."""

    checkpoint: Checkpoint
    state: StoredState

    @property
    def plan(self) -> dict[str, Any]:
        return self.state.plan


def find_resume_point(request: RunRequest, processes: Processes, report: Reporter) -> ResumePoint | None:
    """The checkpoint to resume from, which the first rank chooses and every rank reads; None for a new run.

    Every node has a copy of it in its own folders.
    """
    checkpoint = processes.from_main(lambda: _find_checkpoint(request, report))
    if checkpoint is None:
        return None
    if processes.num_nodes > 1:
        chosen, checkpoint = checkpoint, _copy_on_this_node(request, checkpoint)
        processes.on_other_nodes(lambda: _require_copy(chosen, checkpoint, processes.node_rank))
    return ResumePoint(checkpoint, read_training_state(checkpoint.directory))


def _copy_on_this_node(request: RunRequest, chosen: Checkpoint) -> Checkpoint:
    """This node's copy of the checkpoint that the first node has chosen; `_require_copy` checks that it is there."""
    assert request.resume_from is not None, "the first node has the same request"
    named, name = request.resume_from, chosen.directory.name
    is_checkpoint = (named / MANIFEST_NAME).exists()
    return replace(chosen, directory=named.with_name(name) if is_checkpoint else named / name)


def _require_copy(chosen: Checkpoint, copy: Checkpoint, node_rank: int) -> None:
    found = checkpoint_files.read_checkpoint(copy.directory)
    if found is None:
        problem = "it is missing"
    elif found.manifest != chosen.manifest:
        problem = "it has another manifest"
    else:
        problem = checkpoint_files.find_damage(found)
    if problem is not None:
        name = chosen.directory.name
        raise TrainingFailed(
            f"Node {node_rank} has no valid copy of the checkpoint {name}: {problem}.",
            hint="Its worker fetches the checkpoint before the run starts; see the log of the worker.",
        )


def require_equal_inputs(plan: Plan, processes: Processes) -> None:
    """Raise `CannotTrain` if the nodes have read different copies of the data or the weights."""
    for what, fingerprint in (("data", plan.data), ("base model", plan.base)):
        found = processes.gather(fingerprint)
        different = [node for node, rank in enumerate(processes.first_ranks) if found[rank] != found[0]]
        if different:
            raise CannotTrain(
                f"The {what} of node {different[0]} differs from that of node 0.",
                hint="Make the same files available to all workers, or upload them to the service.",
            )


def _find_checkpoint(request: RunRequest, report: Reporter) -> Checkpoint | None:
    if request.resume_from is None:
        return None
    checkpoint = checkpoint_files.find_resumable(request.resume_from, request.output_dir, report.warn)
    if checkpoint is None:
        report.warn(
            "no_checkpoint_yet", f"{request.output_dir} has no checkpoint yet, so the run starts from the beginning."
        )
    return checkpoint
