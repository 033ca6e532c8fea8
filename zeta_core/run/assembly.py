"""Assembling what trains a learner: the engine for one or several processes, the evaluator and the reference."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

from torch import nn

from zeta_core.checkpoint import checkpoint_files
from zeta_core.checkpoint.checkpoint_files import Checkpoint
from zeta_core.checkpoint.random_state import restore_random_state, seed_everything
from zeta_core.checkpoint.staging import Tensors
from zeta_core.checkpoint.training_state import TrainingProgress
from zeta_core.contract.job.checkpoint import BEST_CHECKPOINT
from zeta_core.contract.job.comparison import MIN_DOCUMENTS
from zeta_core.data.sequences import Sequences
from zeta_core.environment import ProcessRank
from zeta_core.model.activation_checkpointing import recomputed_activations, repeated_blocks
from zeta_core.model.compilation import compiled
from zeta_core.objective.document_losses import DocumentEvaluator
from zeta_core.objective.evaluation import Evaluator
from zeta_core.objective.loss import LossFunction
from zeta_core.objective.preference import AnswerSequences, PreferenceLoss, prepare_references
from zeta_core.objective.sampling import SampleWriter
from zeta_core.parallel.deferred_weights import DeferredWeights
from zeta_core.parallel.processes import Engine, Processes
from zeta_core.parallel.strategy import build_engine
from zeta_core.plan import Plan
from zeta_core.report.reporter import Reporter
from zeta_core.run.decision import Decision
from zeta_core.run.inputs import Inputs, ResumePoint, tokenizer_of_data
from zeta_core.run.learner import Learner
from zeta_core.run.request import RunRequest


@contextmanager
def prepared_engine(
    model: nn.Module,
    request: RunRequest,
    plan: Plan,
    processes: Processes,
    report: Reporter,
    weights: DeferredWeights | None,
) -> Generator[Engine]:
    """The engine for the plan's strategy, with compilation and activation checkpointing applied; closed at the end.

    ``weights`` are those of a model whose weights were deferred.
    """
    with ExitStack() as stack:
        blocks = repeated_blocks(model)
        if plan.compile:
            stack.enter_context(compiled(blocks))
            report.log(f"The first step compiles {len(blocks)} x {type(blocks[0]).__name__}; that can take a minute.")
        stack.enter_context(recomputed_activations(blocks, plan.use_activation_checkpointing))
        engine = build_engine(
            model, plan, processes, blocks=blocks, deepspeed=request.options.use_deepspeed, weights=weights
        )
        stack.callback(engine.close)
        yield engine


def reference_for(
    engine: Engine, loss_function: LossFunction, decision: Decision, resume_point: ResumePoint | None, report: Reporter
) -> Tensors:
    """The initial model's log-probabilities for every answer, stored in each checkpoint; empty if none are needed."""
    if not isinstance(loss_function, PreferenceLoss) or not loss_function.has_reference:
        return {}
    held_out = None if decision.held_out is None else decision.held_out.sequences
    data = [some for some in (decision.sequences, held_out) if isinstance(some, AnswerSequences)]
    stored = None if resume_point is None else resume_point.state
    reference = prepare_references(engine, loss_function, data, decision.plan.batch_size, stored)
    what = "answers" if decision.plan.method == "kto" else "pairs"
    report.log(f"The reference model's log-probabilities are available for {sum(map(len, data)):,} {what}.")
    return reference


def begin_or_resume(
    request: RunRequest, engine: Engine, resume_point: ResumePoint | None, plan: Plan, rank: ProcessRank
) -> TrainingProgress:
    """Seed this rank; if a checkpoint is resumed, restore the optimizer's state and the random states."""
    seed_everything(plan.seed, rank.rank)
    if resume_point is None:
        return TrainingProgress()
    stored = resume_point.state
    engine.restore_optimizer(stored)
    if len(stored.random) == rank.world_size:
        restore_random_state(stored.random[rank.rank])
    else:
        seed_everything(plan.seed, rank.rank, stored.progress.step)
    if resume_point.checkpoint.directory.parent.resolve() != request.output_dir.resolve():
        stored.progress.inherited_seconds = stored.progress.train_seconds
    return stored.progress


def best_elsewhere(
    request: RunRequest,
    resume_point: ResumePoint | None,
    progress: TrainingProgress,
    processes: Processes,
    report: Reporter,
) -> Checkpoint | None:
    """The best checkpoint of a run that continues in another ``output_dir``, which must contain it as well.

    It is next to the checkpoint that the run resumes from. If it is missing, the next evaluation sets a new best.
    """
    if resume_point is None or progress.best_step is None:
        return None
    folder, run_id, step = (
        resume_point.checkpoint.directory.parent,
        resume_point.checkpoint.manifest.run_id,
        progress.best_step,
    )

    def find() -> tuple[bool, Checkpoint | None]:
        if folder.resolve() == request.output_dir.resolve():
            return True, None
        best = checkpoint_files.read_checkpoint(folder / BEST_CHECKPOINT)
        same = best is not None and (best.manifest.run_id, best.manifest.step) == (run_id, step)
        if best is None or not same or checkpoint_files.find_damage(best) is not None:
            report.warn(
                "no_best_checkpoint", f"The best checkpoint, of step {step}, is missing next to the one to resume."
            )
            return False, None
        return True, best

    is_valid, found = processes.from_main(find)
    if not is_valid:
        progress.best_step = progress.best_loss = None
    return found


def build_evaluator(
    request: RunRequest, inputs: Inputs, decision: Decision, engine: Engine, learner: Learner, report: Reporter
) -> Evaluator | None:
    """The evaluator, which computes the loss on held-out data and samples text; None if nothing is held out."""
    plan, held_out = decision.plan, decision.held_out
    if held_out is None:
        return None
    samples = SampleWriter(
        held_out.tokens,
        plan.seq_len,
        learner.loss_function,
        tokenizer_of_data(request, inputs),
        engine.processes,
        engine.device,
        report,
        ends=learner.ends,
        seed=plan.seed,
    )
    documents: DocumentEvaluator | None = None
    is_comparable = learner.loss_function.is_likelihood and held_out.tokens.num_documents >= MIN_DOCUMENTS
    if is_comparable and not plan.compile:  # compiling for each length would take long
        parts = Sequences(held_out.tokens, plan.seq_len, pack=False, overlong=request.options.overlong)
        documents = DocumentEvaluator(
            held_out.tokens,
            parts,
            learner.loss_function,
            engine.processes,
            engine.device,
            max_batch_tokens=plan.batch_size * plan.seq_len,  # which are known to fit into the memory
        )
    return Evaluator(plan, engine, learner.loss_function, held_out.sequences, samples, report, documents)
