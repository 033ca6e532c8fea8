"""``Trainer``: calling it trains. The documented names, order and defaults, then the fields of the HTTP spec."""

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
from zeta_core.contract.data_files.data_folder import Split
from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.spec import availability
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import NamedModel
from zeta_core.contract.spec.validation import error_of, parse, shown

DEFAULT_OUTPUT_DIR = "zeta_output"
_SWITCHES = ("use_fsdp", "use_activation_checkpointing", "use_pretokenized", "use_deepspeed")
_SOURCES: dict[str, Split] = {"dataset": "train", "eval_dataset": "held_out"}


@dataclass(frozen=True)
class TrainResult:
    """What a training did. Losses are means per predicted token in nats; ``steps`` are optimizer steps of the run.

    ``steps_trained`` are those of this call (0 when a finished run was resumed); ``checkpoint`` is the directory of
    the newest checkpoint, ``final`` when the run reached its last step. ``eval_loss`` is that of the last evaluation,
    ``best_checkpoint`` the directory of the weights that had the lowest; both are None where nothing was held out.
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
    use_activation_checkpointing: bool = False,
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
    """Train ``model`` and return what came of it. Everything but the model may be left out, or be None.

    ``model`` is an ``nn.Module`` (trained in place), a callable that builds one, a config (of transformers, or as the
    HTTP spec has it), a hub id or a local directory. The keyword-only extras are those of the HTTP spec: ``dataset``
    and ``eval_dataset`` (also a path, a `datasets.Dataset` or a `DatasetDict`, or several), ``eval_split``, ``lora``
    (also True), ``freeze``, ``tokenizer``, ``max_steps``, ``epochs``, ``optimizer`` and the rest of `TrainerOptions`.
    ``learning_rate`` may be ``"find"``. Under torchrun or ``accelerate launch`` every process calls it. SIGTERM saves a
    checkpoint after the current step and then ends the process as it would have.

    Raises `InvalidSpec` for an unknown keyword or a bad value, `TrainingFailed` for what only training can find out.
    """
    if model is None or model == "":
        raise InvalidSpec(
            f"model is {model!r}; give an nn.Module, a callable that builds one, a config, a hub id or a local "
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
        given = more.get(name)
        if isinstance(given, list):
            more[name] = [_source(one, name, notes) for one in cast("list[Any]", given)]
        else:
            more[name] = _source(given, name, notes)
    if isinstance(more.get("lora"), bool):
        more["lora"] = {} if more["lora"] else None
    options = parse(TrainerOptions, _said({**documented, **more}))
    if faults := availability.faults(options):
        raise error_of(faults)
    directory = _directory(DEFAULT_OUTPUT_DIR if output_dir is None else output_dir)
    return _train(options, model, tokenizer, directory, notes)


def _source(given: Any, name: str, notes: list[str]) -> Any:
    """A source as the spec has it. A dataset of `datasets` becomes a file, which is described in ``notes``."""
    if isinstance(given, str | os.PathLike):
        return {"path": os.fspath(cast("str | os.PathLike[str]", given))}
    is_object = isinstance(given, dict) and not type(given).__module__.startswith("datasets")
    source = cast("dict[str, Any]", given) if is_object else {"path": given}
    if type(source.get("path")).__module__.split(".")[0] != "datasets":
        return given
    from zeta_core.data.dataset_objects import is_dataset_object, stored_dataset
    from zeta_core.environment import home

    if not is_dataset_object(source["path"]):
        return given
    path, note = stored_dataset(source["path"], home() / "cache", name, _SOURCES[name])
    notes.append(note)
    return {**source, "path": str(path)}


def _directory(given: object) -> Path:
    if not isinstance(given, str | os.PathLike) or not os.fspath(cast("str | os.PathLike[str]", given)):
        raise InvalidSpec(f"output_dir is {shown(given)}; it must be a path.", param="output_dir")
    return _path(cast("str | os.PathLike[str]", given))


def _path(given: str | os.PathLike[str]) -> Path:
    """The absolute path, with ``~`` and ``~user`` expanded."""
    return expanded(given).absolute()


def _said(keywords: dict[str, Any]) -> dict[str, Any]:
    """What was said: None leaves a keyword out, and so does a switch that is off, which is no wish to change a run.

    Paths are their text, and whole numbers of numpy are Python's. A name that nobody knows stays, to be told.
    """
    said: dict[str, Any] = {}
    for name, value in keywords.items():
        if name in TrainerOptions.model_fields and (value is None or (value is False and name in _SWITCHES)):
            continue
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, Integral) and not isinstance(value, int):
            value = int(value)
        said[name] = value
    return said


def _train(options: TrainerOptions, model: Any, tokenizer: Any, output_dir: Path, notes: list[str]) -> TrainResult:
    from zeta_core.data.sources import Places
    from zeta_core.environment import home, place
    from zeta_core.report.journal import Console, Report
    from zeta_core.run import Run, execute

    here = place()
    report = Report(Console()) if here.is_main else Report()
    for note in notes:
        report.log(note)
    if options.dataset is None:
        report.log("No dataset was named: training on the Python language reference (pydoc_data.topics).")
        if options.use_pretokenized:
            report.warn("not_pretokenized", "use_pretokenized changes nothing here: that text is tokenized first.")
    resume = options.resume_from_checkpoint
    with _stopping_on_sigterm() as asked:
        run = Run(
            options=options,
            model=model,
            output_dir=output_dir,
            cache=home() / "cache",
            places=Places(any_path=True),
            resume_from=None if resume is None else _path(resume),
            tokenizer=tokenizer,
            stop=lambda: "hand_back" if asked.is_set() else None,
        )
        outcome = execute(run, here, report)
    progress = outcome.progress
    if progress.train_loss is not None:
        report.log(f"Trained {outcome.steps_trained} steps; mean loss {progress.train_loss:.4f}; {outcome.checkpoint}")
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
    """An event that SIGTERM sets; when the training has saved itself, the signal does what it did before."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        asked.set()

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: one that is not Python's
    if asked.is_set():
        signal.raise_signal(signal.SIGTERM)
