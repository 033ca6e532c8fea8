"""The state of a run between two optimizer steps, besides the weights; written and read without pickle.

Optimizer tensors are stored as safetensors, numbers and random states as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from zeta_core.checkpoint.row_file import Rows
from zeta_core.checkpoint.staging import Tensors
from zeta_core.contract.job.comparison import DOCUMENT_LOSSES_FILE, DocumentLosses
from zeta_core.contract.wire.run_directory import TRAINING_STATE_NAME
from zeta_core.failures import CannotResume

WEIGHTS_FILE = "weights.safetensors"  # the trained weights, unless the exported files contain them exactly
CONSTANT_TENSORS_FILE = "fixed.safetensors"
MAX_EXPONENT = 700.0  # of a perplexity that a float can represent


@dataclass
class TrainingProgress:
    """The progress of a run. Counts include all ranks; ``loss_sum`` is in nats over ``num_targets`` tokens."""

    step: int = 0
    consumed_sequences: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    num_targets: int = 0
    train_seconds: float = 0.0  # without evaluations
    inherited_seconds: float = 0.0  # the part that was trained in another directory
    evaluated_step: int = 0  # the step of the last evaluation
    eval_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_since_best: int = 0
    memory: dict[str, int] | None = None  # bytes by part, in the first step of the latest attempt with a step

    @property
    def train_loss(self) -> float | None:
        return self.loss_sum / self.num_targets if self.num_targets else None

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics in a checkpoint of this step; an evaluation is included only if it was after this step."""
        metrics = {"train_loss": self.train_loss}
        if self.eval_loss is not None and self.evaluated_step == self.step:
            metrics |= {"eval_loss": self.eval_loss, "perplexity": perplexity(self.eval_loss)}
        return {name: value for name, value in metrics.items() if value is not None}


def perplexity(loss: float) -> float:
    """The exponential of the loss in nats, limited to a value that a float can represent."""
    return math.exp(min(loss, MAX_EXPONENT))


@dataclass(frozen=True)
class Snapshot:
    """A run's state in memory. It is independent of the running training after ``complete`` has been called."""

    weights: Tensors  # of a sharded model: the rows of this rank, which ``rows`` describes
    aliases: dict[str, str]  # alias of a tied weight -> its name in ``weights``
    optimizer: Tensors
    optimizer_values: dict[str, Any]
    random: list[dict[str, Any]]  # by rank
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    complete: Callable[[], None] = field(default=lambda: None)  # `Staging.finish`
    document_losses: DocumentLosses | None = None
    rows: Mapping[str, Rows] | None = None  # None: ``weights`` are whole, on the first rank


# --- Optimizer --------------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> tuple[Tensors, dict[str, Any]]:
    """The optimizer's state with keys ``<parameter>/<field>``: its tensors, and its other values."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    tensors: Tensors = {}
    values: dict[str, Any] = {}
    for parameter, state in cast(dict[torch.Tensor, dict[str, Any]], optimizer.state).items():
        for key, value in state.items():
            target = tensors if isinstance(value, torch.Tensor) else values
            target[f"{names[parameter]}/{key}"] = value
    return tensors, values


def restore_optimizer(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Tensors, values: Mapping[str, Any]
) -> None:
    """Restore an optimizer's state, on its devices. Raises `CannotResume` if a parameter does not exist."""
    parameters = dict(module.named_parameters())
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for key, value in (*tensors.items(), *values.items()):
        name, _, entry = key.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None:
            raise CannotResume(f"The optimizer's state contains {name!r}, which the model does not have.")
        if isinstance(value, torch.Tensor):
            stays = entry == "step" and not fused
            value = value.clone() if stays else value.to(parameter.device, copy=True)
        cast(dict[Any, dict[str, Any]], optimizer.state)[parameter][entry] = value


# --- Files ------------------------------------------------------------------------------------------------------------


def write_training_state(folder: Path, snapshot: Snapshot, plan: Mapping[str, Any], weights: Tensors) -> None:
    """Write ``training_state/`` of a checkpoint, except the optimizer's tensors, which the engine writes.

    ``weights`` are those that the exported files do not contain exactly.
    """
    folder.mkdir(exist_ok=True)
    if weights:
        save_file(weights, folder / WEIGHTS_FILE)
    (folder / "random.json").write_text(json.dumps(snapshot.random))
    content = {"plan": plan, "progress": asdict(snapshot.progress), "optimizer_values": snapshot.optimizer_values}
    (folder / "state.json").write_text(json.dumps(content, indent=1))
    if snapshot.document_losses is not None:
        (folder / DOCUMENT_LOSSES_FILE).write_text(snapshot.document_losses.model_dump_json())


@dataclass(frozen=True)
class StoredState:
    """The content of ``training_state/``; tensors are read on demand."""

    folder: Path
    plan: dict[str, Any]
    progress: TrainingProgress
    random: list[dict[str, Any]]
    optimizer_values: dict[str, Any]

    def constant_tensors(self) -> Tensors:
        """Tensors that were computed once, at the first start, and are stored with every checkpoint."""
        file = self.folder / CONSTANT_TENSORS_FILE
        return load_file(file) if file.is_file() else {}

    def document_losses(self) -> DocumentLosses | None:
        """The losses on held-out documents, if the last evaluation of a run was at this checkpoint."""
        file = self.folder / DOCUMENT_LOSSES_FILE
        return DocumentLosses.model_validate_json(file.read_bytes()) if file.is_file() else None

    def optimizer_tensors(self) -> Tensors:
        file = self.folder / "optimizer.safetensors"
        return load_file(file) if file.is_file() else {}


def read_training_state(directory: Path) -> StoredState:
    folder = directory / TRAINING_STATE_NAME
    content = json.loads((folder / "state.json").read_text())
    random_states = json.loads((folder / "random.json").read_text())
    progress = TrainingProgress(**content["progress"])
    return StoredState(folder, content["plan"], progress, random_states, content["optimizer_values"])
