"""A run from its options to its outcome: everything around the training loop, in the order in which it happens.

Data is tokenized before any process group exists, so no rank waits in a collective for another that still reads. The
first rank decides what is read from and moved in ``output_dir``; the others are told.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeta_core import checkpoint as checkpoints
from zeta_core import plan as planning
from zeta_core import state as states
from zeta_core.activation import checkpointed, repeated_blocks
from zeta_core.checkpoint import Checkpoint
from zeta_core.compilation import compiled
from zeta_core.contract.events import StatusLine
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job import JobResult, JobStatus, StopAction
from zeta_core.contract.spec import BuiltinSource, DatasetSource, TrainerOptions, dataset_sources
from zeta_core.data import Places, open_sources
from zeta_core.failures import InvalidData
from zeta_core.loss import find_loss
from zeta_core.model import (
    Located,
    check_vocabulary,
    locate_model,
    locate_tokenizer,
    num_positions,
    skeleton_of,
    values_per_token,
)
from zeta_core.packing import Sequences
from zeta_core.parallel import Processes
from zeta_core.plan import Plan
from zeta_core.report import Report
from zeta_core.saving import Export, Saver
from zeta_core.settings import Place, free_memory_bytes, library_environment
from zeta_core.state import Progress
from zeta_core.strategy import build_engine
from zeta_core.tokens import TokenFile, prepare_tokens
from zeta_core.train import Course

_NOT_ISOLATED = (
    "{}'s forward takes no attention mask or positions that keep documents apart, so those that share a sequence see "
    "one another; pack=False gives each document sequences of its own."
)
_SLOW_PRECISION = (
    "mixed_precision is {!r}, and a CPU without instructions for it is several times slower with it than with 'no'."
)


@dataclass(frozen=True)
class Run:
    """What is to be trained, from either door; paths are absolute. ``stop`` is asked after every optimizer step."""

    options: TrainerOptions
    model: object
    output_dir: Path
    cache: Path
    places: Places
    resume_from: Path | None = None
    tokenizer: object = None
    stop: Callable[[], StopAction | None] = field(default=lambda: None)


@dataclass(frozen=True)
class Outcome:
    """How a training ended: with its last step (``stopped`` None), or because it was asked to."""

    run_id: str
    progress: Progress
    steps_trained: int
    total_steps: int
    checkpoint: Path | None
    stopped: StopAction | None

    @property
    def result(self) -> JobResult:
        done = self.progress
        return JobResult(train_loss=done.train_loss, tokens=done.tokens, train_seconds=round(done.train_seconds, 3))


def execute(run: Run, place: Place, report: Report) -> Outcome:
    """Train as ``run`` says. Raises `TrainingFailed`, and whatever a model or a library raises."""
    options = run.options
    report.phase("loading_data")
    located = locate_model(run.model, run.places, run.cache)
    wanted = run.tokenizer if run.tokenizer is not None else options.tokenizer
    tokenizer = locate_tokenizer(wanted, located, run.places, run.cache)
    tokens = _tokens(run, tokenizer, report)

    with ExitStack() as stack:
        stack.enter_context(library_environment(deepspeed=bool(options.use_deepspeed), cuda=torch.cuda.is_available()))
        processes = Processes(place, need_group=options.use_fsdp or bool(options.use_deepspeed))
        stack.callback(processes.close)
        report.phase("loading_model")
        found = processes.from_main(lambda: _find_checkpoint(run, report))
        stored = None if found is None else states.read_state(found.directory)
        torch.manual_seed(options.seed if options.seed is not None else planning.defaults.SEED)
        model = located.build()
        check_vocabulary(model, tokens.largest_id)
        plan = planning.decide(options, _facts(place, model, located, tokens), stored.plan if stored else None)
        sequences = Sequences(tokens, plan.seq_len, pack=plan.pack)
        if not len(sequences):
            raise InvalidData("The data holds no document of at least two tokens; give more text.")
        plan = planning.with_length(plan, options, len(sequences))
        if plan.mixed_precision != "no" and not torch.cuda.is_available():
            report.warn("slow_precision", _SLOW_PRECISION.format(plan.mixed_precision))
        torch.set_num_threads(plan.threads)
        if torch.cuda.is_available():
            stack.enter_context(_deterministic_kernels())
        run_id = processes.from_main(lambda: _take_output_dir(run, found, plan, report))

        dtype = located.dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        model.float()  # weights are trained in float32, whatever they are stored in
        if found is not None:
            states.load_weights(model, found.directory)
        aliases = states.unique_weights(model.state_dict())[1]
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        loss_of = find_loss(model, sample_ids=_sample(tokens), isolate=plan.pack)
        if plan.pack and not loss_of.isolates and tokens.num_documents > 1:
            report.warn("documents_not_isolated", _NOT_ISOLATED.format(type(model).__name__))
        export = Export(skeleton_of(model, dtype), tokenizer, dtype, located.base_model)
        # FSDP and DeepSpeed change a module for good, so the caller's own one gets the weights at the end instead.
        apart = located.from_caller and plan.strategy != "replicated"
        trained = copy.deepcopy(model) if apart else model
        blocks = repeated_blocks(trained)
        if plan.compile:
            stack.enter_context(compiled(blocks))
            report.log(f"The first step compiles {len(blocks)} x {type(blocks[0]).__name__}; that can take a minute.")
        if plan.use_activation_checkpointing:
            stack.enter_context(checkpointed(blocks))
        engine = build_engine(
            trained,
            plan,
            processes,
            blocks=blocks,
            deepspeed=options.use_deepspeed,
        )
        stack.callback(engine.close)

        progress = Progress()
        states.seed_everything(plan.seed, place.rank)
        if stored is not None:
            progress = stored.progress
            engine.restore_optimizer(stored)
            if len(stored.random) == place.world_size:
                states.restore_random(stored.random[place.rank])
            else:
                states.seed_everything(plan.seed, place.rank, progress.step)
        resolved = _resolved(run, plan, run_id, engine.device, num_parameters)
        report.write(StatusLine(status=JobStatus.RUNNING, resolved_spec=resolved))
        report.log(
            f"{options.entity_name or run_id}: {num_parameters:,} parameters, {plan.total_steps} steps of "
            f"{plan.global_batch} sequences of {plan.seq_len} tokens, on {place.world_size} x {engine.device.type}."
        )
        if stored is not None:
            _say_resumed(report, progress, plan, stored.plan)

        saver = Saver(run.output_dir, run_id, export, plan.stored(), engine, report, keep=options.save_total_limit)
        stack.callback(saver.close)
        saver.newest = found
        course = Course(
            plan=plan,
            engine=engine,
            loss_of=loss_of,
            sequences=sequences,
            progress=progress,
            aliases=aliases,
            saver=saver,
            report=report,
            output_dir=run.output_dir,
            checkpointing_steps=options.checkpointing_steps,
            asked_to_stop=run.stop,
            may_split=place.world_size == 1
            and plan.strategy != "zero"
            and options.batch_size is None
            and options.gradient_accumulate_every is None,
        )
        stopped = course.train()
        newest = course.finish(stopped)
        if apart and newest is not None:
            states.load_weights(model, newest)
        return Outcome(run_id, progress, course.steps_trained, plan.total_steps, newest, stopped)


@contextmanager
def _deterministic_kernels() -> Generator[None]:
    """The same seed gives the same bits on a GPU, too; a kernel that cannot is warned of by torch, not refused."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _tokens(run: Run, tokenizer: Any, report: Report) -> TokenFile:
    """The data as tokens; a run that names none trains on a text that every machine has, and says so."""
    dataset: list[DatasetSource] = dataset_sources(run.options.dataset)
    if not dataset:
        dataset = [BuiltinSource(builtin="python-docs")]
    sources = open_sources(dataset, run.places, pretokenized=run.options.use_pretokenized)
    return prepare_tokens(sources, tokenizer, run.cache, report)


def _find_checkpoint(run: Run, report: Report) -> Checkpoint | None:
    if run.resume_from is None:
        return None
    found = checkpoints.find(run.resume_from, run.output_dir, report.warn)
    if found is None:
        report.warn("no_checkpoint_yet", f"{run.output_dir} has no checkpoint yet, so its run begins again.")
    return found


def _facts(place: Place, model: nn.Module, located: Located, tokens: TokenFile) -> planning.Facts:
    cuda = torch.cuda.is_available()
    return planning.Facts(
        world_size=place.world_size,
        device="cuda" if cuda else "cpu",
        supports_bf16=cuda and torch.cuda.is_bf16_supported(including_emulation=False),
        threads=torch.get_num_threads(),
        positions=num_positions(model),
        values_per_token=values_per_token(model),
        free_bytes=free_memory_bytes(),
        from_scratch=not located.pretrained,
        data=tokens.fingerprint,
    )


def _take_output_dir(run: Run, found: Checkpoint | None, plan: Plan, report: Report) -> str:
    """Make ``output_dir`` this run's: clean it, move aside what is not of its course; returns the run's id."""
    run_id = new_id("run") if found is None else found.manifest.run_id
    run.output_dir.mkdir(parents=True, exist_ok=True)
    checkpoints.clean(run.output_dir)
    after = None if found is None else found.manifest.step
    moved = checkpoints.set_aside(run.output_dir, after_step=after, run_id=run_id)
    if moved is not None:
        report.log(f"{run.output_dir} held checkpoints of an earlier run; they are in {moved} now.")
    checkpoints.write_plan(run.output_dir, run_id, plan.stored())
    return run_id


def _sample(tokens: TokenFile) -> list[int]:
    """A few ids of the data to try the model with, at least two of them different."""
    ids = [int(token) for token in tokens.ids[:64]]
    different = sorted(set(ids))
    other = next((token for token in different if token != ids[0]), 0 if ids[0] else 1)
    return (
        [*ids[:6], *[other if token == ids[0] else token for token in ids[:6]]]
        if len(ids) >= 6
        else [ids[0], other] * 3
    )


def _resolved(run: Run, plan: Plan, run_id: str, device: torch.device, num_parameters: int) -> dict[str, Any]:
    """The options with every default that was decided, and what they were decided from."""
    numbers = plan.stored()
    del numbers["global_batch"], numbers["warmup"]  # said below by the names of the contract
    decided = {
        **run.options.model_dump(mode="json"),
        **numbers,
        "train_on": run.options.train_on or "all",
        "warmup_steps": plan.warmup_steps,
        "global_batch_size": plan.global_batch,
        "device": str(device),
        "dtype": {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[plan.mixed_precision],
        "num_parameters": num_parameters,
        "run_id": run_id,
    }
    if run.options.max_steps is None:
        decided["epochs"] = planning.defaults.epochs(run.options)
    return decided


def _say_resumed(report: Report, progress: Progress, plan: Plan, before: dict[str, Any]) -> None:
    report.log(f"Resumed after step {progress.step} of {plan.total_steps}.")
    if progress.step >= plan.total_steps:
        report.log("This run is finished; raise max_steps or epochs to train it further.")
    elif before["total_steps"] != plan.total_steps:
        report.warn(
            "schedule_changed",
            f"The run has {plan.total_steps} steps now instead of {before['total_steps']}; the learning rate follows "
            "the schedule of the new length from here on.",
        )
    if before["world_size"] != plan.world_size:
        report.warn(
            "world_size_changed",
            f"The run goes on with {plan.world_size} processes instead of {before['world_size']}: the same sequences "
            "in the same order, with other random numbers for dropout.",
        )
