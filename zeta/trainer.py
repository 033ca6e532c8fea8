"""``Trainer``: a function that trains a model. Its documented keywords come first, then the fields of the HTTP spec."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from types import FrameType
from typing import Any, cast

from zeta.local_files import expanded, template_text
from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import NamedModel
from zeta_core.contract.spec.validation import parse, shown
from zeta_core.system.data_folder import Split

DEFAULT_OUTPUT_DIR = "zeta_output"
_SWITCHES = ("use_fsdp", "use_activation_checkpointing", "use_pretokenized", "use_deepspeed")
_SOURCES: dict[str, Split] = {"dataset": "train", "eval_dataset": "held_out"}


@dataclass(frozen=True)
class TrainResult:
    """The result of a run. Losses are mean nats per predicted token.

    ``steps`` is the number of optimizer steps of the whole run, and ``steps_trained`` that of this call (0 if a
    finished run was resumed). ``checkpoint`` is the directory of the newest checkpoint, which is ``final`` if the run
    reached its last step. ``eval_loss`` is the loss of the last evaluation, and ``best_checkpoint`` the directory of
    the checkpoint with the lowest one; both are ``None`` without held-out data.
    """

    steps: int
    steps_trained: int
    train_loss: float | None
    eval_loss: float | None
    checkpoint: Path | None
    best_checkpoint: Path | None
    output_dir: Path
    run_id: str
    tokens: int
    train_seconds: float


def Trainer(
    gradient_accumulate_every: int | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    entity_name: str | None = None,
    model: Any = None,
    use_fsdp: bool = False,
    use_activation_checkpointing: bool | str = False,
    learning_rate: float | str | None = None,
    seed: int | None = None,
    use_pretokenized: bool = False,
    resume_from_checkpoint: str | os.PathLike[str] | None = None,
    checkpointing_steps: int | str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    weight_decay: float | None = None,
    use_deepspeed: bool | int | dict[str, Any] | str | None = None,
    **more: Any,
) -> TrainResult:
    """Train ``model`` and return the result. All keywords except ``model`` are optional and may be ``None``.

    ``model`` is an ``nn.Module`` (trained in place), a callable that builds one, a config (a transformers config, or an
    object as in the HTTP spec), a Hub id or a local directory. All other fields of the HTTP spec (`TrainerOptions`) are
    keyword-only: ``dataset`` and ``eval_dataset`` (also a path, a `datasets.Dataset`, a `DatasetDict`, or a list of
    them), ``eval_split``, ``lora`` (also True), ``freeze``, ``tokenizer``, ``max_steps``, ``epochs``, ``optimizer`` and
    more. ``learning_rate`` may be ``"find"``.

    Under torchrun or ``accelerate launch``, every process calls this function. On SIGTERM, it saves a checkpoint after
    the current step; then the signal has its usual effect.

    Raises `InvalidSpec` for an unknown keyword or an invalid value, and `TrainingFailed` if the run fails.
    """
    if model is None or model == "":
        raise InvalidSpec(
            f"model is {model!r}; pass an nn.Module, a callable that builds one, a config, a Hub id or a local "
            "directory.",
            param="model",
        )
    if isinstance(model, dict):
        model = parse(NamedModel, {"model": model}).model
    documented: dict[str, Any] = {
        "gradient_accumulate_every": gradient_accumulate_every,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "entity_name": entity_name,
        "use_fsdp": use_fsdp,
        "use_activation_checkpointing": use_activation_checkpointing,
        "learning_rate": learning_rate,
        "seed": seed,
        "use_pretokenized": use_pretokenized,
        "resume_from_checkpoint": resume_from_checkpoint,
        "checkpointing_steps": checkpointing_steps,
        "weight_decay": weight_decay,
        "use_deepspeed": use_deepspeed,
    }
    tokenizer = more.pop("tokenizer", None)
    if isinstance(tokenizer, str | dict | os.PathLike) or tokenizer is None:
        documented["tokenizer"] = tokenizer
        tokenizer = None
    more["chat_template"] = template_text(more.get("chat_template"))
    notes: list[str] = []
    for name in _SOURCES:
        value = more.get(name)
        if isinstance(value, list):
            more[name] = [_source(item, name, notes) for item in cast("list[Any]", value)]
        else:
            more[name] = _source(value, name, notes)
    if isinstance(more.get("lora"), bool):
        more["lora"] = {} if more["lora"] else None
    options = parse(TrainerOptions, _set_options({**documented, **more}))
    directory = _directory(DEFAULT_OUTPUT_DIR if output_dir is None else output_dir)
    return _train(options, model, tokenizer, directory, notes)


def _source(value: Any, name: str, notes: list[str]) -> Any:
    """A source of the spec. A dataset object of `datasets` is stored as a file, which a note describes."""
    if isinstance(value, str | os.PathLike):
        return {"path": os.fspath(cast("str | os.PathLike[str]", value))}
    is_object = isinstance(value, dict) and not type(value).__module__.startswith("datasets")
    source = cast("dict[str, Any]", value) if is_object else {"path": value}
    if type(source.get("path")).__module__.split(".")[0] != "datasets":
        return value
    from zeta_core.data.sources.dataset_objects import is_dataset_object, stored_dataset
    from zeta_core.environment import home

    if not is_dataset_object(source["path"]):
        return value
    path, note = stored_dataset(source["path"], home() / "cache", name, _SOURCES[name])
    notes.append(note)
    return {**source, "path": str(path)}


def _directory(value: object) -> Path:
    if not isinstance(value, str | os.PathLike) or not os.fspath(cast("str | os.PathLike[str]", value)):
        raise InvalidSpec(f"output_dir is {shown(value)}; it must be a path.", param="output_dir")
    return _path(cast("str | os.PathLike[str]", value))


def _path(path: str | os.PathLike[str]) -> Path:
    """The absolute path, with ``~`` and ``~user`` expanded."""
    return expanded(path).absolute()


def _set_options(keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords that the caller has set, with paths as text and numpy integers as ``int``.

    ``None`` counts as not set, and so does a switch that is off, because it does not request a change of a resumed
    run. Unknown keywords are included, so that `parse` reports them.
    """
    options: dict[str, Any] = {}
    for name, value in keywords.items():
        if name in TrainerOptions.model_fields and (value is None or (value is False and name in _SWITCHES)):
            continue
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, Integral) and not isinstance(value, int):
            value = int(value)
        options[name] = value
    return options


def _train(options: TrainerOptions, model: Any, tokenizer: Any, output_dir: Path, notes: list[str]) -> TrainResult:
    from zeta_core.report.library_noise import hide_library_messages

    hide_library_messages()
    from zeta_core.data.sources import SourceLocations
    from zeta_core.environment import ProcessRank, home
    from zeta_core.report.reporter import Console, Reporter
    from zeta_core.run import RunRequest, execute

    rank = ProcessRank.from_environment()
    report = Reporter(Console()) if rank.is_main else Reporter()
    for note in notes:
        report.log(note)
    if options.dataset is None:
        report.log("No dataset was given; training on the Python language reference (pydoc_data.topics).")
        if options.use_pretokenized:
            report.warn("not_pretokenized", "use_pretokenized has no effect, because this text must be tokenized.")
    resume = options.resume_from_checkpoint
    with _stopping_on_sigterm() as stop_requested:
        request = RunRequest(
            options=options,
            model=model,
            output_dir=output_dir,
            cache=home() / "cache",
            locations=SourceLocations(any_path=True),
            resume_from=None if resume is None else _path(resume),
            tokenizer=tokenizer,
            stop=lambda: "hand_back" if stop_requested.is_set() else None,
        )
        outcome = execute(request, rank, report)
    progress = outcome.progress
    if progress.train_loss is not None:
        num_steps = "1 step" if outcome.steps_trained == 1 else f"{outcome.steps_trained:,} steps"
        report.log(f"Trained {num_steps}; mean loss {progress.train_loss:.4f}; {outcome.checkpoint}")
    return TrainResult(
        steps=progress.step,
        steps_trained=outcome.steps_trained,
        train_loss=progress.train_loss,
        eval_loss=progress.eval_loss,
        checkpoint=outcome.checkpoint,
        best_checkpoint=outcome.best_checkpoint,
        output_dir=output_dir,
        run_id=outcome.run_id,
        tokens=progress.tokens,
        train_seconds=progress.train_seconds,
    )


@contextmanager
def _stopping_on_sigterm() -> Generator[threading.Event]:
    """An event that SIGTERM sets. After the run has saved a checkpoint, the signal is raised again."""
    stop_requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested
        return

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop_requested.set()

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield stop_requested
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: set outside Python
    if stop_requested.is_set():
        signal.raise_signal(signal.SIGTERM)
