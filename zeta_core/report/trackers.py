"""``report_to``: the curves of a run in TensorBoard, Weights & Biases and MLflow, through Accelerate's trackers.

If a tracker is not installed or cannot be started, a new run fails before it trains. After that, no tracker blocks or
ends the run. Lines go through a queue to the only thread that calls the trackers. A tracker that fails is dropped
with a warning. If trackers are too slow, lines are dropped. At its end, the run waits for them for `CLOSE_SECONDS`.

A resumed run continues under its ``run_id``: TensorBoard hides steps that are trained again, W&B resumes the run with
that id, and MLflow the run with that tag. TensorBoard's files are in ``output_dir/tensorboard``.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from zeta_core.contract.job.events import JournalLine, ProgressLine
from zeta_core.contract.spec.options import Wandb
from zeta_core.contract.wire.run_directory import TENSORBOARD_DIRECTORY
from zeta_core.environment import tracker_project
from zeta_core.failures import CannotTrain

Name = Literal["tensorboard", "wandb", "mlflow"]
START_SECONDS, CLOSE_SECONDS = 120.0, 30.0
MAX_QUEUED = 1000  # lines; about a quarter of an hour of them
_CURVES = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch", "tokens", "token_accuracy")
_RUN_TAG = "zeta.run_id"

Point = tuple[int, dict[str, float]]
Warn = Callable[[str, str], None]


def require(names: Sequence[Name]) -> None:
    """Raise `CannotTrain` for the first tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise CannotTrain(f"report_to contains {name!r}, which is not installed; pip install {name}, or remove it.")


@dataclass(frozen=True)
class TrackedRun:
    """The data about a run that trackers get: its display name, its id, and the step after which it continues."""

    name: str
    run_id: str
    output_dir: Path
    step: int
    spec: Mapping[str, Any]
    wandb: Wandb | None = None


class Trackers:
    """A sink for progress lines, on the first rank."""

    def __init__(self, warn: Warn, *, close_seconds: float = CLOSE_SECONDS) -> None:
        self._warn = warn
        self._close_seconds = close_seconds
        self._queue: queue.Queue[list[Point] | None] = queue.Queue(MAX_QUEUED)
        self._dropped = 0
        self._started = threading.Event()
        self._errors: list[str] = []
        self._thread: threading.Thread | None = None

    def start(self, openers: Mapping[str, Callable[[], GeneralTracker]], *, required: bool) -> None:
        """Start the trackers in their thread. A failure raises `CannotTrain` if ``required``, else gives a warning."""
        self._thread = threading.Thread(target=self._work, args=(openers,), name="trackers", daemon=True)
        self._thread.start()
        if not self._started.wait(START_SECONDS):
            self._errors.append(f"{', '.join(openers)} did not start within {START_SECONDS:.0f} s")
        if self._errors and required:
            self.close()
            raise CannotTrain(f"report_to: {self._errors[0]}; fix this, or omit it.")
        for error in self._errors:
            self._warn("tracker_failed", f"report_to: {error}; the run continues without it.")

    def write(self, line: JournalLine) -> None:
        """Queue a line, without waiting."""
        if not isinstance(line, ProgressLine) or line.step is None:
            return
        points = _points(line.step, line)
        if not points:
            return
        try:
            self._queue.put_nowait(points)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Let the trackers finish, within `CLOSE_SECONDS`."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            self._queue.put(None, timeout=self._close_seconds)
        except queue.Full:
            self._dropped += self._queue.qsize()
            self._queue.queue.clear()
            self._queue.put_nowait(None)  # ends the thread when its current call returns
        thread.join(self._close_seconds)
        if thread.is_alive():
            self._warn(
                "tracker_slow",
                f"The trackers did not finish within {self._close_seconds:.0f} s; the run ends without them.",
            )
        if self._dropped:
            self._warn("tracker_slow", f"The trackers were too slow: {self._dropped} lines were dropped.")

    # --- the thread ---

    def _work(self, openers: Mapping[str, Callable[[], GeneralTracker]]) -> None:
        active: dict[str, GeneralTracker] = {}
        for name, opener in openers.items():
            try:
                active[name] = opener()
            except Exception as error:  # noqa: BLE001 - reported by `start`
                self._errors.append(f"{name} cannot be started ({_in_words(error)})")
        self._started.set()
        while (points := self._queue.get()) is not None:
            for point in points:
                self._each(active, _logging(*point))
        self._each(active, lambda tracker: tracker.finish())

    def _each(self, active: dict[str, GeneralTracker], act: Callable[[GeneralTracker], None]) -> None:
        for name, tracker in list(active.items()):
            try:
                act(tracker)
            except Exception as error:  # noqa: BLE001 - a tracker must not end the run, whatever it raises
                del active[name]
                self._warn("tracker_failed", f"{name} failed ({_in_words(error)}); the run continues without it.")


def _points(step: int, line: ProgressLine) -> list[Point]:
    """The points of a line and of its individual steps; a step's own figures take precedence over the means."""
    by_step: dict[int, dict[str, float]] = {step: {}}
    for values in (line, *(line.steps or ())):
        if values.loss is not None:
            curves = {f"train/{name}": value for name in _CURVES if (value := getattr(values, name, None)) is not None}
            curves |= _rewards("train", values.rewards)
            by_step[values.step or step] = {**by_step.get(values.step or step, {}), **curves}
    if line.eval_loss is not None:
        by_step[step] |= {"eval/loss": line.eval_loss, **_rewards("eval", line.rewards)}
        if line.eval_token_accuracy is not None:
            by_step[step] |= {"eval/token_accuracy": line.eval_token_accuracy}
    return [(at, by_step[at]) for at in sorted(by_step) if by_step[at]]


def _rewards(of: str, rewards: Mapping[str, float] | None) -> dict[str, float]:
    """The rewards of a method that learns preferences: of chosen and rejected answers, their margin, and more."""
    return {f"{of}/rewards/{name}": value for name, value in (rewards or {}).items()}


def _logging(step: int, values: dict[str, float]) -> Callable[[GeneralTracker], None]:
    def log(tracker: GeneralTracker) -> None:
        if isinstance(tracker, WandBTracker):
            tracker.log({**values, "step": step})  # W&B's own step cannot go back, as a resumed run's does
        else:
            tracker.log(values, step=step)

    return log


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


# --- The trackers -----------------------------------------------------------------------------------------------------


def openers(names: Sequence[Name], run: TrackedRun) -> dict[str, Callable[[], GeneralTracker]]:
    """Functions that start the named trackers for this run."""
    known: dict[Name, Callable[[TrackedRun], GeneralTracker]] = {
        "tensorboard": _tensorboard,
        "wandb": _wandb,
        "mlflow": _mlflow,
    }
    return {name: lambda start=known[name]: start(run) for name in names}


def _tensorboard(run: TrackedRun) -> GeneralTracker:
    folder = re.sub(r"[^\w.+-]+", "_", run.name).strip(".") or run.run_id
    tracker = TensorBoardTracker(folder, run.output_dir / TENSORBOARD_DIRECTORY, purge_step=run.step + 1)
    tracker.start()
    tracker.log({"spec": f"```json\n{json.dumps(dict(run.spec), indent=1)}\n```"}, step=run.step)
    return tracker


def _wandb(run: TrackedRun) -> GeneralTracker:
    wandb = run.wandb or Wandb()
    settings = {"name": wandb.name or run.name, "id": run.run_id, "resume": "allow", "dir": str(run.output_dir)}
    given = {"entity": wandb.entity, "tags": wandb.tags}
    settings |= {name: value for name, value in given.items() if value}
    tracker = WandBTracker(wandb.project or tracker_project(), **settings)
    tracker.start()
    tracker.tracker.define_metric("*", step_metric="step")
    tracker.store_init_configuration(_flat(run.spec))
    return tracker


def _mlflow(run: TrackedRun) -> GeneralTracker:
    import mlflow  # pyright: ignore[reportMissingImports] - not in [train]; `require` has checked it

    client: Any = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(tracker_project())
    same = f"tags.`{_RUN_TAG}` = '{run.run_id}'"
    found = [] if experiment is None else client.search_runs([experiment.experiment_id], same, max_results=1)
    known = found[0].info.run_id if found else None
    tracker = MLflowTracker(tracker_project(), run_id=known, run_name=run.name, tags={_RUN_TAG: run.run_id})
    tracker.start()
    if known is None:  # parameters of an MLflow run cannot change
        tracker.store_init_configuration(_flat(run.spec))
    return tracker


def _flat(spec: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The spec as a table of parameters: simple values as they are, others as JSON."""
    plain = (bool, int, float, str)
    return {
        name: value if isinstance(value, plain) else json.dumps(value)
        for name, value in spec.items()
        if value is not None
    }
