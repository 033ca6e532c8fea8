"""A job in words: its name, model, data, method, progress, and the commands that it accepts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from zeta_core.contract.job.advice import set_options
from zeta_core.contract.job.commands import COMMAND_TABLE, COMMANDS, Accepted, Command, Effect, job_situation
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.kind import KINDS, JobKind
from zeta_core.contract.job.status import ENDED, REASON_SENTENCES, JobStatus, StatusReason

_PHASES = {
    "fetching": "fetching files",
    "loading_data": "reading data",
    "loading_model": "loading the model",
    "finding_learning_rate": "finding a learning rate",
    "training": "training",
    "answering": "answering",
    "evaluating": "evaluating",
    "saving": "saving a checkpoint",
}
_TABS = ("overview", "log", "events", "checkpoints", "samples", "chat", "data", "settings")
_TABS_OF_OTHER_KINDS = ("overview", "log", "events", "checkpoints", "settings")


@dataclass(frozen=True)
class JobView:
    """A job and the texts that the pages show for it."""

    job: Job
    owner: str  # the name of the API key that submitted it
    sparkline: str = ""  # the points of an SVG polyline, if there are at least two losses

    @property
    def name(self) -> str:
        return self.job.entity_name or self.job.id

    @property
    def is_training(self) -> bool:
        return self.job.kind is JobKind.TRAINING

    @property
    def tabs(self) -> tuple[str, ...]:
        """The pages of the job."""
        return _TABS if self.is_training else _TABS_OF_OTHER_KINDS

    @property
    def model(self) -> str:
        """The model in the spec: a Hub id, a file name, an earlier job's checkpoint, or the type of a new model."""
        model = self.job.spec.get("model")
        if not isinstance(model, dict):
            return str(model)
        source = cast("dict[str, Any]", model)
        if isinstance(config := source.get("config"), dict):
            return f"{cast('dict[str, Any]', config).get('model_type')} from scratch"
        if "job" in source:
            return f"{source['job']}/{source.get('checkpoint', 'final')}"
        return self._file(source["file"]) if "file" in source else str(source.get("builder"))

    @property
    def data(self) -> str:
        """The data sources in the spec."""
        dataset = self.job.spec.get("dataset")
        if dataset is None:
            return ""
        sources = cast("list[Any]", dataset if isinstance(dataset, list) else [dataset])
        return ", ".join(self._source(source) for source in sources)

    @property
    def method(self) -> str:
        """How the model is trained, in one or two words; for a job of another kind, what it does."""
        spec = self.job.spec
        if self.job.kind is JobKind.EXPORT:
            return f"export to {spec.get('to')}"
        if self.job.kind is JobKind.BATCH:
            return f"batch of {spec.get('num_requests')} requests"
        if self.job.kind is JobKind.EVALUATION:
            return "evaluation compared with the base" if spec.get("base") is not None else "evaluation"
        lora = spec.get("lora")
        kind = method.upper() if isinstance(method := spec.get("method"), str) and method != "sft" else ""
        if isinstance(lora, dict):
            return f"{kind} {'QLoRA' if cast('dict[str, Any]', lora).get('quantize') else 'LoRA'}".strip()
        if isinstance(model := spec.get("model"), dict) and "config" in model:
            return kind  # the model's name says that it is trained from scratch
        return kind or "full fine-tuning"

    @property
    def summary(self) -> str:
        """Model, method and data in one line."""
        return " · ".join(part for part in (self.model, self.method, self.data) if part)

    @property
    def is_live(self) -> bool:
        return self.job.status not in ENDED

    @property
    def status_text(self) -> str:
        """The status, and what is requested of a running job."""
        action = self.job.requested_action
        if self.job.status == JobStatus.RUNNING and action is not None:
            return "cancelling" if action == "cancel" else "pausing"
        return str(self.job.status)

    @property
    def reason(self) -> str | None:
        """Why the job waits, is paused or has failed, in a sentence."""
        reason = self.job.status_reason
        if reason == StatusReason.PAUSED_BY_USER:
            return None  # the status says it
        if self.job.waiting_reason is not None:
            return self.job.waiting_reason.message
        if self.job.status in (JobStatus.PAUSED, JobStatus.FAILED) and reason is not None:
            return REASON_SENTENCES.get(reason)
        return None

    @property
    def phase(self) -> str:
        """What a running job is doing."""
        if self.job.status != JobStatus.RUNNING:
            return ""
        return _PHASES.get(str(self.progress.get("phase")), "starting")

    @property
    def progress(self) -> Mapping[str, Any]:
        return self.job.progress or {}

    def value(self, name: str) -> Any:
        """A value of the newest progress, or None."""
        return self.progress.get(name)

    @property
    def total_steps(self) -> int | None:
        total = self.progress.get("total_steps") or self.job.resolved_spec.total_steps
        return total if isinstance(total, int) else None

    @property
    def share(self) -> float | None:
        """The completed share of the run, from 0 to 1; ``None`` if it is unknown."""
        step, total = self.progress.get("step"), self.total_steps
        return min(1.0, step / total) if isinstance(step, int) and total else None

    @property
    def seconds_to_start(self) -> float | None:
        """The time until a waiting job starts, if that can be estimated."""
        return None if self.job.waiting_reason is None else self.job.waiting_reason.seconds_to_start(utc_now())

    @property
    def eta_seconds(self) -> float | None:
        eta = self.progress.get("eta_seconds")
        return eta if self.job.status == JobStatus.RUNNING and isinstance(eta, int | float) else None

    @property
    def seconds(self) -> float | None:
        """The running time over all attempts that have ended, and of the current one."""
        if not self.job.attempts:
            return None
        now = utc_now()
        return sum(((each.finished_at or now) - each.started_at).total_seconds() for each in self.job.attempts)

    @property
    def commands(self) -> set[str]:
        """The commands that the job accepts now and that would change something."""
        return {command for command in COMMANDS if self._accepts(command)}

    def patch_text(self, patch: Mapping[str, Any]) -> str:
        """A patch of the spec as ``name=value`` pairs."""
        return ", ".join(set_options(patch))

    def _accepts(self, command: Command) -> bool:
        job = self.job
        if command == "checkpoint" and not KINDS[job.kind].saves_checkpoints:
            return False
        reason = StatusReason(job.status_reason) if job.status_reason else None
        situation = job_situation(job.status, reason, job.requested_action)
        rule = COMMAND_TABLE[situation][command]
        return isinstance(rule, Accepted) and rule.effect != Effect.NOTHING

    def _source(self, source: Any) -> str:
        if not isinstance(source, dict):
            return str(source)
        fields = cast("dict[str, Any]", source)
        files = fields.get("file")
        if files is not None:
            ids = cast("list[Any]", files if isinstance(files, list) else [files])
            return ", ".join(self._file(file_id) for file_id in ids)
        return next((str(fields[kind]) for kind in ("hub", "path", "builtin") if kind in fields), str(fields))

    def _file(self, file_id: Any) -> str:
        known = self.job.resolved_spec.files.get(str(file_id))
        return str(file_id) if known is None else known.filename
