"""The request for a run, from a script or a job, and its outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from torch import nn

from zeta_core.checkpoint.training_state import TrainingProgress
from zeta_core.contract.job.checkpoint import BEST_CHECKPOINT
from zeta_core.contract.job.job import JobResult
from zeta_core.contract.job.memory import MemoryParts
from zeta_core.contract.job.status import StopAction
from zeta_core.contract.spec.deepspeed import requested_zero_stage
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.data.sources import SourceLocations


@dataclass(frozen=True)
class RunRequest:
    """A request to train, from a script or a job. Paths are absolute. ``stop`` is called after every optimizer step.

    ``newest_save_request`` returns the number of the newest request to save a checkpoint, or 0; it is called as often.
    ``on_training_start`` is called on every rank when everything is loaded; after that, there may be progress to save.
    ``threads`` (per process) and ``device_kind`` are those of an earlier attempt, even if it saved no checkpoint,
    because exact results depend on them. ``started_on`` is the day of the first start, if known.
    """

    options: TrainerOptions
    model: object
    output_dir: Path
    cache: Path
    locations: SourceLocations
    resume_from: Path | None = None
    tokenizer: object = None
    threads: int | None = None
    device_kind: str | None = None
    started_on: date | None = None
    stop: Callable[[], StopAction | None] = field(default=lambda: None)
    newest_save_request: Callable[[], int] = field(default=lambda: 0)
    on_training_start: Callable[[], None] = field(default=lambda: None)

    @property
    def quantizes(self) -> bool:
        return self.options.lora is not None and self.options.lora.quantize is not None

    @property
    def continues_adapter(self) -> bool:
        """Whether the adapter that ``model`` names is trained further."""
        return self.options.lora is not None and self.options.lora.continue_adapter

    @property
    def maps_weights(self) -> bool:
        """Whether weights stay memory-mapped until each process takes its own part of them."""
        shards = self.options.use_fsdp or requested_zero_stage(self.options.use_deepspeed) == 3
        return shards and not isinstance(self.model, nn.Module)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after its last step (``stopped`` is None), or by a stop request."""

    run_id: str
    progress: TrainingProgress
    steps_trained: int
    total_steps: int
    checkpoint: Path | None
    best_checkpoint: Path | None
    stopped: StopAction | None

    @property
    def result(self) -> JobResult:
        done = self.progress
        # A finished run that is resumed elsewhere trains nothing there, and returns the same result.
        own_seconds = done.train_seconds - done.inherited_seconds or done.train_seconds
        return JobResult(
            train_loss=done.train_loss,
            eval_loss=done.eval_loss,
            best_checkpoint=None if done.best_step is None else BEST_CHECKPOINT,
            tokens=done.tokens,
            train_seconds=round(own_seconds, 3),
            memory=None if done.memory is None else MemoryParts.model_validate(done.memory),
        )
