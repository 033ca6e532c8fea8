"""A run from its options to its outcome: everything around the training loop, in the order in which it happens.

Data is tokenized before any process group exists, so no rank waits in a collective for another that still reads. The
first rank decides what is read from and moved in ``output_dir``; the others are told.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeta_core import plan as planning
from zeta_core.advice import Setup, padding_advice, vocabulary_patch
from zeta_core.checkpoint import directory as checkpoints
from zeta_core.checkpoint import state as states
from zeta_core.checkpoint.directory import Checkpoint
from zeta_core.checkpoint.state import Progress, Stored, Tensors
from zeta_core.contract import defaults
from zeta_core.contract.events import StatusLine
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job import JobResult, JobStatus, StopAction
from zeta_core.contract.memory import MemoryParts
from zeta_core.contract.sources import BuiltinSource, Dataset, dataset_sources
from zeta_core.contract.spec import TrainerOptions
from zeta_core.data import report as data_reports
from zeta_core.data.encode import is_bytes
from zeta_core.data.packing import Overlong, Sequences
from zeta_core.data.sources import Places, open_sources
from zeta_core.data.token_cache import prepare_tokens
from zeta_core.data.tokens import TokenFile
from zeta_core.decided import merges, resolved_spec, say_resumed
from zeta_core.failures import CannotTrain, is_disk_full
from zeta_core.memory.allocator import keeping_freed_memory
from zeta_core.memory.before_loading import check_before_loading
from zeta_core.memory.needs import check_it_can_fit, has_plenty
from zeta_core.model.activation import checkpointed, repeated_blocks
from zeta_core.model.compilation import compiled
from zeta_core.model.facts import check_positions, check_vocabulary, facts_without_data
from zeta_core.model.lora import base_fingerprint
from zeta_core.model.quantized import require as require_bitsandbytes
from zeta_core.model.sources import Located, locate_model, locate_tokenizer
from zeta_core.model.trained import choose_what_is_trained
from zeta_core.objective.evaluation import Evaluator, hold_out
from zeta_core.objective.loss import LossOf, find_loss
from zeta_core.objective.preference import DpoLoss, Pairs, prepare_reference
from zeta_core.objective.sampling import Samples
from zeta_core.parallel.processes import Engine, Processes
from zeta_core.parallel.strategy import build_engine, check_launcher
from zeta_core.parallel.surroundings import as_it_was, compute_with, deterministic_kernels
from zeta_core.plan import Plan
from zeta_core.report.journal import Report
from zeta_core.report.trackers import TrackedRun, Trackers, openers
from zeta_core.report.trackers import require as require_trackers
from zeta_core.settings import Place, asked_of_accelerate, library_environment
from zeta_core.train.loop import Course
from zeta_core.train.out_of_memory import explained
from zeta_core.train.rate_search import find_learning_rate
from zeta_core.train.saving import Saver


@dataclass(frozen=True)
class Run:
    """What is to be trained, from either door; paths are absolute. ``stop`` is asked after every optimizer step.

    ``steps_begin`` is told on every rank when all is loaded: from then on there may be something to save.
    ``threads`` of each process are those of an earlier attempt that left no checkpoint; bits depend on them.
    """

    options: TrainerOptions
    model: object
    output_dir: Path
    cache: Path
    places: Places
    resume_from: Path | None = None
    tokenizer: object = None
    threads: int | None = None
    stop: Callable[[], StopAction | None] = field(default=lambda: None)
    steps_begin: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True)
class Outcome:
    """How a training ended: with its last step (``stopped`` None), or because it was asked to."""

    run_id: str
    progress: Progress
    steps_trained: int
    total_steps: int
    checkpoint: Path | None
    best_checkpoint: Path | None
    stopped: StopAction | None

    @property
    def result(self) -> JobResult:
        done = self.progress
        return JobResult(
            train_loss=done.train_loss,
            eval_loss=done.eval_loss,
            best_checkpoint=None if done.best_step is None else "best",
            tokens=done.tokens,
            train_seconds=round(done.train_seconds, 3),
            memory=None if done.memory is None else MemoryParts.model_validate(done.memory),
        )


def execute(run: Run, place: Place, report: Report) -> Outcome:
    """Train as ``run`` says. Raises `TrainingFailed`, and whatever a model or a library raises."""
    options = run.options
    require_trackers(options.report_to)
    quantizes = options.lora is not None and options.lora.quantize is not None
    if quantizes:
        require_bitsandbytes()
    report.phase("loading_data")
    if run.resume_from is None:  # what is left out there is as the run was started
        check_before_loading(run.model, options, run.places, run.cache, world_size=place.world_size)
    located = locate_model(run.model, run.places, run.cache)
    wanted = run.tokenizer if run.tokenizer is not None else options.tokenizer
    tokenizer = locate_tokenizer(wanted, located, run.places, run.cache)
    tokens = _tokens(run, options.dataset or BuiltinSource(builtin="python-docs"), tokenizer, place, report)
    held_out = None if options.eval_dataset is None else _tokens(run, options.eval_dataset, tokenizer, place, report)

    asked = asked_of_accelerate()
    with ExitStack() as stack:
        memory = stack.enter_context(explained())
        stack.enter_context(library_environment(deepspeed=bool(options.use_deepspeed), cuda=torch.cuda.is_available()))
        processes = Processes(place, need_group=options.use_fsdp or bool(options.use_deepspeed))
        stack.callback(processes.close)
        stack.enter_context(as_it_was())
        report.phase("loading_model")
        found = processes.from_main(lambda: _find_checkpoint(run, report))
        stored = None if found is None else states.read_state(found.directory)
        torch.manual_seed(planning.seed_of(options, stored.plan if stored else None))
        model = located.mapped() if quantizes and located.mapped is not None else located.build()
        largest_id = max(data.largest_id for data in (tokens, held_out) if data is not None)
        check_vocabulary(model, largest_id, vocabulary_patch(options, run.model, located, largest_id + 1))
        facts = _facts(place, model, located, tokens, held_out, options.overlong, run.threads)
        plan = planning.decide(options, facts, stored.plan if stored else None)
        check_launcher(asked, plan, cuda=torch.cuda.is_available())
        if plan.eval_split:
            split = hold_out(tokens, plan.eval_split, plan.seed)
            tokens, held_out = split.train, split.held_out
        sequences = _sequences(tokens, plan, options)
        evaluated = None if held_out is None else _sequences(held_out, plan, options)
        if not len(sequences):
            raise data_reports.nothing_to_train(tokens, sequences)
        plan = planning.with_length(plan, options, len(sequences))
        check_positions(model, plan.seq_len)
        memory.plan = plan
        told = compute_with(plan.threads)
        if torch.cuda.is_available():
            stack.enter_context(deterministic_kernels())
        processes.gather(None)  # every rank has read what it needs of a directory that is moved now
        run_id = processes.from_main(lambda: _take_output_dir(run, found, plan, report))

        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        saved, export = choose_what_is_trained(model, located, plan, tokenizer, merge=merges(options))
        num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if found is not None:
            states.load_weights(model, found.directory, saved.names)
        loss_of = find_loss(model, sample_ids=_sample(tokens), isolate=plan.pack, largest_id=largest_id)
        if plan.beta is not None:
            loss_of = DpoLoss.of(loss_of, plan.beta, type(model).__name__)
        loss_of.check_labels(type(model).__name__, needed=tokens.supervised is not None)
        setup = Setup(options, plan, facts, located, model, loss_of, tokens.num_documents)
        if padding := padding_advice(tokenizer, sequences, loss_of, plan):
            report.advise(padding) if padding.patch else report.log(padding.message)
        may_split = place.world_size == 1 and plan.strategy != "zero" and defaults.batch_split(options) == (None, None)
        check_it_can_fit(model, plan, sequences.mean_length, may_split=may_split)
        ours = not torch.cuda.is_available()  # torch keeps the memory of a GPU itself
        if ours and has_plenty(model, plan, sequences.mean_length, facts.values_per_token):
            stack.enter_context(keeping_freed_memory())
        if not plan.learning_rate:
            decided = find_learning_rate(
                model,
                plan,
                processes,
                loss_of=loss_of,
                sequences=sequences,
                deepspeed=options.use_deepspeed,
                usual=setup.usual_rates,
                report=report,
                asked_to_stop=run.stop,
                may_split=may_split,
                memory=memory,
            )
            if not isinstance(decided, Plan):
                return Outcome(run_id, Progress(), 0, plan.total_steps, None, None, decided)
            plan = memory.plan = decided
            setup = replace(setup, plan=plan)
            if place.is_main:
                checkpoints.write_plan(run.output_dir, run_id, plan.stored())
        for advice in setup.advice():
            report.advise(advice)
        # FSDP and DeepSpeed change a module for good, so the caller's own one gets the weights at the end instead.
        apart = located.from_caller and plan.strategy != "replicated"
        trained = copy.deepcopy(model) if apart else model
        blocks = repeated_blocks(trained)
        if plan.compile:
            stack.enter_context(compiled(blocks))
            report.log(f"The first step compiles {len(blocks)} x {type(blocks[0]).__name__}; that can take a minute.")
        if plan.use_activation_checkpointing:
            stack.enter_context(checkpointed(blocks))
        engine = build_engine(trained, plan, processes, blocks=blocks, deepspeed=options.use_deepspeed)
        stack.callback(engine.close)
        reference: Tensors = {}
        if isinstance(loss_of, DpoLoss):
            pairs = [some for some in (sequences, evaluated) if isinstance(some, Pairs)]
            reference = prepare_reference(engine, loss_of, pairs, plan.batch_size, stored)
            report.log(f"The reference knows {sum(map(len, pairs)):,} pairs.")

        progress = _begin_or_go_on(engine, stored, plan, place)
        evaluator = None
        if held_out is not None and evaluated is not None:
            evaluator = _evaluator(run, plan, engine, loss_of, held_out, evaluated, tokenizer, report)
        data = data_reports.describe(tokens, sequences, plan)
        resolved = {
            **resolved_spec(options, plan, held_out, data),
            "device": str(engine.device),
            "num_parameters": num_parameters,
            "num_trained_parameters": num_trained,
            "run_id": run_id,
        }
        report.write(StatusLine(status=JobStatus.RUNNING, resolved_spec=resolved))
        name = options.entity_name or run_id
        if options.report_to and place.is_main:
            tracked = TrackedRun(name, run_id, run.output_dir, progress.step, resolved)
            trackers = Trackers(report.warn)
            trackers.start(openers(options.report_to, tracked), required=stored is None)
            stack.enter_context(report.also_to(trackers))
        some = "" if num_trained == num_parameters else f", {num_trained:,} of them trained"
        some += " and the base in 4 bits" if quantizes else ""
        report.log(
            f"{name}: {num_parameters:,} parameters{some}, {plan.total_steps} steps of "
            f"{plan.global_batch} sequences of {plan.seq_len} tokens, on {place.world_size} x {engine.device.type}."
        )
        data_reports.tell(data, sequences, report)
        if stored is not None:
            say_resumed(report, progress, plan, stored.plan, threads_told=told)

        keep = options.save_total_limit
        saver = Saver(run.output_dir, run_id, export, saved, plan.stored(), engine, report, keep=keep)
        stack.callback(saver.close)
        saver.newest = found
        saver.fixed = reference
        course = Course(
            plan=plan,
            engine=engine,
            loss_of=loss_of,
            sequences=sequences,
            progress=progress,
            saved=saved,
            saver=saver,
            evaluator=evaluator,
            report=report,
            output_dir=run.output_dir,
            checkpointing_steps=options.checkpointing_steps,
            asked_to_stop=run.stop,
            watch=setup.watch(report.advise),
            may_split=may_split,
        )
        memory.trains = course
        run.steps_begin()
        stopped = course.train()
        newest = course.finish(stopped)
        if apart and newest is not None:
            states.load_weights(model, newest, saved.names)
        best = run.output_dir / "best"
        best = best if progress.best_step is not None and best.is_dir() else None
        return Outcome(run_id, progress, course.steps_trained, plan.total_steps, newest, best, stopped)


def _tokens(run: Run, dataset: Dataset, tokenizer: Any, place: Place, report: Report) -> TokenFile:
    sources = open_sources(dataset_sources(dataset), run.places, pretokenized=run.options.use_pretokenized)
    return prepare_tokens(
        sources,
        tokenizer,
        run.cache,
        report,
        train_on=run.options.train_on,
        method=run.options.method,
        processes=torch.get_num_threads() * place.world_size,
    )


def _sequences(tokens: TokenFile, plan: Plan, options: TrainerOptions) -> Sequences:
    if plan.beta is not None:
        return Pairs(tokens, plan.seq_len, overlong=options.overlong)
    return Sequences(tokens, plan.seq_len, pack=plan.pack, overlong=options.overlong)


def _begin_or_go_on(engine: Engine, stored: Stored | None, plan: Plan, place: Place) -> Progress:
    """Seed this rank; where a checkpoint is gone on from, give back the optimizer's state and the random states."""
    states.seed_everything(plan.seed, place.rank)
    if stored is None:
        return Progress()
    engine.restore_optimizer(stored)
    if len(stored.random) == place.world_size:
        states.restore_random(stored.random[place.rank])
    else:
        states.seed_everything(plan.seed, place.rank, stored.progress.step)
    return stored.progress


def _evaluator(
    run: Run,
    plan: Plan,
    engine: Engine,
    loss_of: LossOf,
    held_out: TokenFile,
    sequences: Sequences,
    tokenizer: Any,
    report: Report,
) -> Evaluator:
    # Ids that came as they are have no text, unless somebody said which tokenizer they are of.
    named = run.tokenizer is not None or run.options.tokenizer is not None or not is_bytes(tokenizer)
    text = tokenizer if named or not run.options.use_pretokenized else None
    samples = Samples(held_out, plan.seq_len, loss_of, text, engine.processes, engine.device, report, seed=plan.seed)
    return Evaluator(plan, engine, loss_of, sequences, samples, report)


def _find_checkpoint(run: Run, report: Report) -> Checkpoint | None:
    if run.resume_from is None:
        return None
    found = checkpoints.find(run.resume_from, run.output_dir, report.warn)
    if found is None:
        report.warn("no_checkpoint_yet", f"{run.output_dir} has no checkpoint yet, so its run begins again.")
    return found


def _facts(
    place: Place,
    model: nn.Module,
    located: Located,
    tokens: TokenFile,
    held_out: TokenFile | None,
    overlong: Overlong | None,
    threads: int | None,
) -> planning.Facts:
    known = facts_without_data(model, pretrained=located.pretrained, world_size=place.world_size)
    return replace(
        known,
        threads=threads or known.threads,
        data=tokens.fingerprint if overlong is None else f"{tokens.fingerprint} {overlong}",
        eval_data=None if held_out is None else held_out.fingerprint,
        base=base_fingerprint(model),
    )


def _take_output_dir(run: Run, found: Checkpoint | None, plan: Plan, report: Report) -> str:
    """Make ``output_dir`` this run's: clean it, move aside what is not of its course; returns the run's id."""
    run_id = new_id("run") if found is None else found.manifest.run_id
    after = None if found is None else found.manifest.step
    try:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        checkpoints.clean(run.output_dir)
        moved = checkpoints.set_aside(run.output_dir, after_step=after, run_id=run_id)
        checkpoints.write_plan(run.output_dir, run_id, plan.stored())
    except OSError as error:
        if is_disk_full(error):
            raise
        raise CannotTrain(
            f"output_dir is {str(run.output_dir)!r}, which cannot be written ({error.strerror}); name a directory "
            "that can.",
            param="output_dir",
        ) from error
    if moved is not None:
        report.log(f"{run.output_dir} held checkpoints of an earlier run; they are in {moved} now.")
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
