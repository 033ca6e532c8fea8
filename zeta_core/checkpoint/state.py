"""What a run is made of between two optimizer steps: taken to memory quickly, written and read without pickle.

Weights and optimizer tensors are safetensors; numbers and random states are JSON. `Staging` copies the tensors into
buffers that are kept from one checkpoint to the next, beside the next step where it can.
"""

from __future__ import annotations

import json
import math
import random
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from zeta_core.contract.wire.run_directory import TRAINING_STATE_NAME
from zeta_core.failures import CannotResume, InvalidModel

Tensors = dict[str, torch.Tensor]
Bytes = NDArray[np.uint8]

FIXED_FILE = "fixed.safetensors"
LARGEST_EXPONENT = 700.0  # of a perplexity that is still a number
_PIECE_BYTES = 8 << 20  # of a copy that two threads share: small enough to end together


@dataclass
class Progress:
    """Where a run is. Counts are global, over all ranks; ``loss_sum`` is in nats over ``num_targets`` tokens."""

    step: int = 0
    consumed_sequences: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    num_targets: int = 0
    train_seconds: float = 0.0  # without evaluations
    inherited_seconds: float = 0.0  # of them, those of the run in another directory that this one continues
    evaluated_step: int = 0  # after which the run was last evaluated
    eval_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_since_best: int = 0
    memory: dict[str, int] | None = None  # bytes by part, in the first step of the last attempt that made one

    @property
    def train_loss(self) -> float | None:
        return self.loss_sum / self.num_targets if self.num_targets else None

    @property
    def metrics(self) -> dict[str, float]:
        """What a checkpoint of this step tells of it; an evaluation only where it was of this very step."""
        found = {"train_loss": self.train_loss}
        if self.eval_loss is not None and self.evaluated_step == self.step:
            found |= {"eval_loss": self.eval_loss, "perplexity": perplexity(self.eval_loss)}
        return {name: value for name, value in found.items() if value is not None}


def perplexity(loss: float) -> float:
    """e to the loss in nats; beyond what a float can hold, the largest that it can."""
    return math.exp(min(loss, LARGEST_EXPONENT))


@dataclass(frozen=True)
class Snapshot:
    """A run's state in memory, safe from the training that goes on once ``complete`` was called."""

    weights: Tensors
    aliases: dict[str, str]  # a tied weight's other names -> the name in ``weights``
    optimizer: Tensors
    optimizer_values: dict[str, Any]
    random: list[dict[str, Any]]  # by rank
    progress: Progress = field(default_factory=Progress)
    complete: Callable[[], None] = field(default=lambda: None)  # `Staging.finish`


class Staging:
    """Copies tensors into buffers of its own, which are kept from one checkpoint to the next.

    Training waits for no copy that can be made beside it. What only an update changes (parameters and the optimizer's
    tensors) is put on a list by `copy_later`; the thread that writes the checkpoint works it off during the next step's
    forward and backward, and before the update training calls `finish`, too: it takes its share of what is left and
    returns when all is copied. Every promise is checked: a tensor that was written to in between makes `finish` raise,
    and nothing of that save is published (what goes through ``tensor.data`` is not seen).
    """

    def __init__(self) -> None:
        self._buffers: Tensors = {}
        self._later: deque[tuple[Bytes, Bytes]] = deque()  # to, from
        self._unfinished = 0  # pieces, on the list or in the hands of a thread
        self._promised: list[tuple[str, torch.Tensor, int]] = []
        self._broken: str | None = None
        self._moved = threading.Condition()
        self._wanted = threading.Event()

    def copy(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Copies made now; from a GPU they are on their way until `torch.cuda.synchronize`."""
        copies: Tensors = {}
        for name, tensor in tensors.items():
            source = tensor.detach()
            copies[name] = self._buffer(f"{prefix}{name}", source).copy_(source, non_blocking=True)
        return copies

    def copy_later(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Buffers that hold the tensors, as they are now, once `finish` has returned.

        For tensors that nothing changes before that. What is not one stretch of the CPU's memory is copied now: over
        its bus a GPU needs no more for it than the waiting would cost.
        """
        copies: Tensors = {}
        for name, tensor in tensors.items():
            source = tensor.detach()
            if source.device.type != "cpu" or not source.is_contiguous() or not source.nbytes:
                copies |= self.copy(prefix, {name: source})
                continue
            copies[name] = self._buffer(f"{prefix}{name}", source)
            to, of = _bytes_of(copies[name]), _bytes_of(source)
            pieces = [
                (to[at : at + _PIECE_BYTES], of[at : at + _PIECE_BYTES]) for at in range(0, len(of), _PIECE_BYTES)
            ]
            self._unfinished += len(pieces)
            self._later.extend(pieces)
            self._promised.append((name, source, times_written(source)))
        return copies

    def finish(self) -> None:
        """Copy what is left, beside other threads that do, and return when nothing is. Raises `InvalidModel`.

        One thread each: numpy copies without the threads of torch, which are busy, and without the interpreter's lock.
        """
        while True:
            try:
                to, of = self._later.popleft()
            except IndexError:
                break
            np.copyto(to, of)
            with self._moved:
                self._unfinished -= 1
                if not self._unfinished:
                    changed = [name for name, source, version in self._promised if times_written(source) != version]
                    self._broken = changed[0] if changed else None
                    self._promised.clear()
                    self._moved.notify_all()
        with self._moved:
            self._moved.wait_for(lambda: not self._unfinished)
        if self._broken is not None:
            raise InvalidModel(
                f"The model wrote to its parameter {self._broken} outside the optimizer's update, while it was saved; "
                "make it a buffer, or change it under the same optimizer."
            )

    def reserve(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make the buffers and touch their memory: what takes longest in a first copy, done before it is needed.

        For a thread beside the training; it leaves off when the buffers are wanted.
        """
        for name, tensor in tensors.items():
            if self._wanted.is_set():
                return
            _bytes_of(self._buffer(f"{prefix}{name}", tensor.detach())).fill(0)

    def stop_reserving(self) -> None:
        """The buffers are wanted now; those that were not touched yet will be when they are written."""
        self._wanted.set()

    def _buffer(self, key: str, like: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            if like.device.type == "cpu" and like.nbytes >= _PIECE_BYTES:
                # numpy asks the kernel for huge pages, which are touched twice as fast
                memory = np.empty(like.nbytes, dtype=np.uint8)
                buffer = torch.from_numpy(memory).view(like.dtype).view(like.shape)
            else:
                buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
            self._buffers[key] = buffer
        return buffer


def times_written(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place, as torch counts it for its gradients."""
    return tensor._version


def _bytes_of(tensor: torch.Tensor) -> Bytes:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy()


# --- Weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """Which weights a checkpoint holds: by name, each storage once, and the other names of those that are tied.

    ``kept`` are weights of the whole that the model does not hold as they are: those of a quantised base.
    """

    names: frozenset[str]
    aliases: dict[str, str]
    whole: frozenset[str] | None = None  # those of the whole model, where only a part is trained and the whole is asked
    kept: Tensors = field(default_factory=dict[str, torch.Tensor])

    def of(self, checkpoints: Collection[str]) -> frozenset[str]:
        """The names for checkpoints that are called so: the whole model is for those that stay."""
        return self.whole if self.whole is not None and {"best", "final"} & set(checkpoints) else self.names


def unique_weights(state: Mapping[str, Any]) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a state dict, each storage once, and the other names of those that are tied."""
    unique: Tensors = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in seen:
            aliases[name] = seen[identity]
        else:
            seen[identity] = name
            unique[name] = tensor
    return unique, aliases


def load_weights(module: nn.Module, directory: Path, names: Collection[str]) -> None:
    """Put a checkpoint's exact weights of these names into a module, in place; tied weights stay tied.

    Raises `CannotResume`.
    """
    weights = read_weights(directory)
    own, aliases = unique_weights(module.state_dict())
    own = {name: tensor for name, tensor in own.items() if name in names}
    missing = sorted(name for name in own if name not in weights)
    unknown = sorted(name for name in weights if name not in own and name not in aliases)
    if missing or unknown:
        names = f"{len(missing)} are missing ({missing[:2]}), {len(unknown)} unknown ({unknown[:2]})"
        raise CannotResume(f"The weights of {directory.name} are not those of this model: {names}.")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape:
                raise CannotResume(
                    f"{name} has shape {tuple(weights[name].shape)} in {directory.name}, and {tuple(tensor.shape)} "
                    "in the model."
                )
            tensor.copy_(weights[name])


def read_weights(directory: Path) -> Tensors:
    """The weights as they are trained: the master copy, or the exported files where they are the same."""
    master = directory / TRAINING_STATE_NAME / "weights.safetensors"
    files = [master] if master.is_file() else sorted(directory.glob("model*.safetensors"))
    weights: Tensors = {}
    for file in files:
        weights.update(load_file(file))
    return weights


def exported_exactly(directory: Path, weights: Tensors) -> bool:
    """Whether the exported files hold every one of ``weights`` under its own name, with its own precision."""
    kinds: dict[str, tuple[str, list[int]]] = {}
    for path in directory.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                kinds[name] = (part.get_dtype(), part.get_shape())
    return all(kinds.get(name) == (_WORDS.get(t.dtype), list(t.shape)) for name, t in weights.items())


_WORDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}


# --- Optimizer --------------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> tuple[Tensors, dict[str, Any]]:
    """Its state by name of parameter and of field, ``<parameter>/<field>``: tensors, and plain values."""
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
    """Put a state back, each tensor where the optimizer keeps it. Raises `CannotResume` where names differ."""
    parameters = dict(module.named_parameters())
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for key, value in (*tensors.items(), *values.items()):
        name, _, entry = key.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None:
            raise CannotResume(f"The optimizer's state names {name!r}, which the model does not have.")
        if isinstance(value, torch.Tensor):
            stays = entry == "step" and not fused
            value = value.clone() if stays else value.to(parameter.device, copy=True)
        cast(dict[Any, dict[str, Any]], optimizer.state)[parameter][entry] = value


# --- Random states ----------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The state of every generator that a model may draw from in this process, as JSON."""
    kind, keys, position, has_gauss, gauss = cast("tuple[str, Any, int, int, float]", np.random.get_state(legacy=True))
    version, internal, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss_next],
        "numpy": [kind, [int(key) for key in keys], position, has_gauss, gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore_random(state: Mapping[str, Any]) -> None:
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def seed_everything(seed: int, *parts: int) -> None:
    """Seed every generator from ``seed`` and ``parts`` (rank, step): different parts draw differently."""
    words = np.random.SeedSequence((seed, *parts)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


# --- Files ------------------------------------------------------------------------------------------------------------


def write_state(folder: Path, snapshot: Snapshot, plan: Mapping[str, Any], weights: Tensors) -> None:
    """``training_state/`` of a checkpoint, but for the optimizer's tensors, which are the engine's to write.

    ``weights`` are those that the exported files do not hold exactly.
    """
    folder.mkdir(exist_ok=True)
    if weights:
        save_file(weights, folder / "weights.safetensors")
    (folder / "random.json").write_text(json.dumps(snapshot.random))
    content = {"plan": plan, "progress": asdict(snapshot.progress), "optimizer_values": snapshot.optimizer_values}
    (folder / "state.json").write_text(json.dumps(content, indent=1))


@dataclass(frozen=True)
class Stored:
    """``training_state/`` as it was read, tensors aside."""

    folder: Path
    plan: dict[str, Any]
    progress: Progress
    random: list[dict[str, Any]]
    optimizer_values: dict[str, Any]

    def fixed(self) -> Tensors:
        """What was made once, at the first start, and is kept with every checkpoint."""
        file = self.folder / FIXED_FILE
        return load_file(file) if file.is_file() else {}

    def optimizer_tensors(self) -> Tensors:
        file = self.folder / "optimizer.safetensors"
        return load_file(file) if file.is_file() else {}


def read_state(directory: Path) -> Stored:
    folder = directory / TRAINING_STATE_NAME
    content = json.loads((folder / "state.json").read_text())
    random_states = json.loads((folder / "random.json").read_text())
    progress = Progress(**content["progress"])
    return Stored(folder, content["plan"], progress, random_states, content["optimizer_values"])
