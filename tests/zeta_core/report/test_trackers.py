"""Trackers show a run's curves, continue when it is resumed, and never block or end it."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker

from tests.harness.waiting import wait_until
from tests.zeta_core.models import plain
from zeta import Trainer
from zeta_core.contract.job.events import LogLine, ProgressLine, StepFigures
from zeta_core.failures import CannotTrain
from zeta_core.report.trackers import MAX_QUEUED, Trackers

SETTINGS: dict[str, Any] = {"seq_len": 32, "batch_size": 4, "learning_rate": 1e-2, "lr_scheduler": "constant"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZETA_HOME", str(tmp_path / "home"))


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed; `make setup` does not install it")


def train_and_resume(out: Path, tracker: str) -> None:
    """Train two steps, then resume the run for two more."""
    named: dict[str, Any] = {"report_to": [tracker], "entity_name": "a first/run", "output_dir": out, **SETTINGS}
    Trainer(model=plain(), max_steps=2, **named)
    Trainer(model=plain(), max_steps=4, resume_from_checkpoint=out, **named)


@needs("tensorboard")
def test_tensorboard_shows_one_curve_of_a_resumed_run_under_its_name(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_and_resume(tmp_path / "out", "tensorboard")
    shown: Any = EventAccumulator(str(tmp_path / "out" / "tensorboard" / "a_first_run")).Reload()
    losses = shown.Scalars("train/loss")
    assert [point.step for point in losses] == [1, 2, 3, 4]
    assert losses[0].value > losses[-1].value
    assert {"train/learning_rate", "train/grad_norm", "train/tokens", "train/epoch"} <= set(shown.Tags()["scalars"])
    (spec,) = shown.Tensors("spec/text_summary")[:1]
    assert json.loads(spec.tensor_proto.string_val[0].decode().split("\n", 1)[1].rsplit("\n", 1)[0])["seq_len"] == 32


@needs("wandb")
@pytest.mark.timeout(200)
def test_wandb_offline_writes_its_files_to_the_output_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_and_resume(tmp_path / "out", "wandb")
    found = [path.name for path in (tmp_path / "out" / "wandb").glob("offline-run-*")]
    assert found
    assert len({name.rsplit("-", 1)[1] for name in found}) == 1, "both parts have the id of the run"


@needs("mlflow")
@pytest.mark.timeout(200)
def test_mlflow_continues_the_run_of_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow  # pyright: ignore[reportMissingImports] - optional

    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    train_and_resume(tmp_path / "out", "mlflow")
    client: Any = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("zeta").experiment_id])
    assert run.info.run_name == "a first/run"
    assert run.data.params["seq_len"] == "32"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_rejected_first(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    with pytest.raises(CannotTrain, match=f"report_to contains '{name}', .*pip install {name}"):
        Trainer(model=plain(), max_steps=1, report_to=[name], output_dir=tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


# --- Trackers that misbehave ------------------------------------------------------------------------------------------


class Recorded(GeneralTracker):
    name = "recorded"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int | None] = []
        self.values: list[dict[str, Any]] = []
        self.finished = False

    @property
    def tracker(self) -> Any:
        return self

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.steps.append(step)
        self.values.append(values)

    def finish(self) -> None:
        self.finished = True


class Failing(Recorded):
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        raise ConnectionError("the service is gone")


class Hanging(Recorded):
    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.let_go.wait()


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    tracker = Hanging()
    yield tracker
    tracker.let_go.set()


def at(step: int) -> ProgressLine:
    return ProgressLine(phase="training", step=step, loss=1.0)


def test_a_failing_tracker_gives_one_warning_and_the_others_continue() -> None:
    warnings: list[str] = []
    failing, good = Failing(), Recorded()
    trackers = Trackers(lambda _, message: warnings.append(message))
    trackers.start({"failing": lambda: failing, "good": lambda: good}, required=True)
    several = at(4).model_copy(update={"steps": [StepFigures(step=step, loss=2.0) for step in (2, 3, 4)]})
    for line in (at(1), LogLine(message="no curve"), ProgressLine(phase="saving", step=1), several):
        trackers.write(line)
    trackers.close()
    assert good.steps == [1, 2, 3, 4]
    assert good.finished
    assert len(warnings) == 1
    assert "failing failed (ConnectionError: the service is gone)" in warnings[0]


def test_the_rewards_of_dpo_are_curves_of_training_and_evaluation() -> None:
    trackers, good = Trackers(lambda _code, _message: None), Recorded()
    trackers.start({"good": lambda: good}, required=True)
    first, both = {"chosen": 0.25, "margin": 0.5}, {"chosen": 0.5, "margin": 1.0}
    steps = [StepFigures(step=1, loss=2.0, rewards=first), StepFigures(step=2, loss=1.0)]
    trackers.write(ProgressLine(phase="training", step=2, loss=1.5, rewards=both, steps=steps))
    trackers.write(ProgressLine(phase="evaluating", step=2, eval_loss=0.5, rewards=first))
    trackers.close()
    assert good.steps == [1, 2, 2]
    assert good.values == [
        {"train/loss": 2.0, "train/rewards/chosen": 0.25, "train/rewards/margin": 0.5},
        {"train/loss": 1.0, "train/rewards/chosen": 0.5, "train/rewards/margin": 1.0},
        {"eval/loss": 0.5, "eval/rewards/chosen": 0.25, "eval/rewards/margin": 0.5},
    ]


def test_a_hanging_tracker_does_not_block_and_loses_lines(hanging: Hanging) -> None:
    warnings: list[str] = []
    trackers = Trackers(lambda _, message: warnings.append(message), close_seconds=0.2)
    trackers.start({"hanging": lambda: hanging}, required=True)
    for step in range(MAX_QUEUED + 10):
        trackers.write(at(step))
    trackers.close()
    assert "did not finish within" in warnings[0]
    assert "lines were dropped" in warnings[1]
    hanging.let_go.set()
    wait_until(
        lambda: not any(thread.name == "trackers" for thread in threading.enumerate()), 10, "the end of the thread"
    )


def _unable() -> GeneralTracker:
    raise RuntimeError("no key")


def test_a_tracker_that_cannot_start_fails_only_a_new_run() -> None:
    warnings: list[str] = []

    def warn(_: str, message: str) -> None:
        warnings.append(message)

    with pytest.raises(CannotTrain, match=r"service cannot be started \(RuntimeError: no key\)"):
        Trackers(warn).start({"service": _unable}, required=True)
    trackers = Trackers(warn)
    trackers.start({"service": _unable}, required=False)
    trackers.write(at(1))
    trackers.close()
    assert len(warnings) == 1
    assert "continues without it" in warnings[0]
