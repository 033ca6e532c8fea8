"""Processes, devices, and distributing the model over them, without silent fallbacks.

Accelerate sets up devices, DDP and DeepSpeed. FSDP2 uses torch's ``fully_shard``, because Accelerate's plugin becomes
plain DDP on processes without an accelerator. After set-up, the distributed type, the number of processes and the class
of the wrapped model are checked. Misconfigurations that Accelerate would accept (every rank trains alone on all the
data, gradients are not exchanged, the plugin is dropped) raise `CannotTrain`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from safetensors.torch import save_file
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

from zeta_core.checkpoint.row_file import Rows
from zeta_core.checkpoint.staging import Staging, Tensors, times_written
from zeta_core.checkpoint.training_state import StoredState, optimizer_tensors, restore_optimizer
from zeta_core.environment import ProcessRank
from zeta_core.failures import CannotTrain
from zeta_core.optim.optimizer import ParameterGroups, build_optimizer
from zeta_core.optim.scaling import LossScale
from zeta_core.parallel.data_dependence import may_skip_parameters
from zeta_core.parallel.deferred_weights import DeferredWeights
from zeta_core.parallel.process_group import GROUP_TIMEOUT, connect
from zeta_core.plan import Plan

_LOSS_SCALE = "loss_scale"  # key in the optimizer's values; the other keys contain a slash

T = TypeVar("T")


class Processes:
    """The processes of a run: the rank of this one, and their collective operations."""

    def __init__(self, rank: ProcessRank, *, need_group: bool) -> None:
        self._rank = rank
        self._own_group = False
        self._excepthook = sys.excepthook  # a process group replaces it
        if (rank.launched or need_group) and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            if torch.cuda.is_available():
                torch.cuda.set_device(rank.local_rank)
            if rank.launched:
                connect(backend, rank)
            else:
                dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=GROUP_TIMEOUT)
                self._own_group = True
        if dist.is_initialized() and dist.get_world_size() != rank.world_size:
            raise CannotTrain(
                f"WORLD_SIZE is {rank.world_size}, but the process group has {dist.get_world_size()} processes.",
                hint="Start the script with torchrun or `accelerate launch`; the Trainer connects its processes.",
            )

    @property
    def rank(self) -> int:
        return self._rank.rank

    @property
    def is_main(self) -> bool:
        return self._rank.is_main

    @property
    def is_first_of_node(self) -> bool:
        """Whether this rank reads and writes the files of its node for the other ranks there."""
        return self._rank.is_first_of_node

    @property
    def node_rank(self) -> int:
        return self._rank.node_rank

    @property
    def num_nodes(self) -> int:
        """The hosts of a job, each of which has folders of its own; 1 if all ranks share their folders."""
        return self._rank.num_nodes

    @property
    def first_ranks(self) -> list[int]:
        """The first rank of each node."""
        return list(range(0, self._rank.world_size, self._rank.ranks_per_node))

    @property
    def world_size(self) -> int:
        return self._rank.world_size

    def from_main(self, decide: Callable[[], T]) -> T:
        """Call ``decide`` on the first rank, and return its result, or raise its exception, on every rank."""
        if self.world_size == 1:
            return decide()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = decide()
            except Exception as error:  # noqa: BLE001 - raised below, on every rank
                answer[1] = error
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return cast(T, answer[0])

    def on_other_nodes(self, act: Callable[[], object]) -> None:
        """Call ``act`` on the first rank of every node except the first node, and raise its exception on every rank.

        Does nothing if there is only one node.
        """
        if self.num_nodes == 1:
            return
        failure: Exception | None = None
        if self.is_first_of_node and not self.is_main:
            try:
                act()
            except Exception as error:  # noqa: BLE001 - raised below, on every rank
                failure = error
        for found in self.gather(failure):
            if found is not None:
                raise found

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: torch.Tensor) -> list[float]:
        """The element-wise sum over ranks as numbers. It is the only wait for the device in an optimizer step."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return cast("list[float]", values.tolist())

    def close(self) -> None:
        """Destroy a process group that was created here, so a notebook can start another run."""
        if not self._own_group or not dist.is_initialized():
            return
        deepspeed: Any = sys.modules.get("deepspeed.comm")
        if deepspeed is not None and deepspeed.is_initialized():
            deepspeed.destroy_process_group()  # also destroys the groups that it derived from it
        else:
            dist.destroy_process_group()
        sys.excepthook = self._excepthook


class Replicated:
    """The whole model on every process: a single process, or DDP."""

    caution: str | None = None  # a requirement that cannot be checked
    writes_shards = False  # every rank writes a part of the optimizer's state
    _keeps_gradients = False  # as zeros after each update, instead of freeing them

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        processes: Processes,
        *,
        blocks: list[nn.Module],
        weights: DeferredWeights | None = None,
    ) -> None:
        """``weights`` are the deferred weights of a model without storage, which are removed from it when read."""
        self.processes = processes
        self._deferred = weights
        self.module = model
        self._plan = plan
        self.num_shards = plan.num_shards  # processes that share a copy of the model, if it is sharded
        self.accelerator = self._accelerator()
        self.device = cast(torch.device, self.accelerator.device)
        self.optimizer: torch.optim.Optimizer
        self.loss_scale = LossScale(self.device.type) if plan.mixed_precision == "fp16" else None
        self.model = self._wrap(blocks)
        self._check()
        self._writes_at_start = self._times_written()
        self._is_unchanged_between_updates: bool | None = None  # determined at the first update

    # --- set-up ---

    def _accelerator(self) -> Accelerator:
        AcceleratorState._reset_state(True)  # pyright: ignore[reportPrivateUsage] - global, not per Accelerator
        cpu = not torch.cuda.is_available()
        handlers = [
            DistributedDataParallelKwargs(
                find_unused_parameters=may_skip_parameters(self.module),
                gradient_as_bucket_view=True,  # DDP would otherwise hold a second copy of all gradients
            )
        ]
        # `_autocast` sets the precision, because Accelerate would copy logits to float32.
        return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=cast(Any, handlers))

    def _wrap(self, blocks: list[nn.Module]) -> nn.Module:
        self.module.to(self.device)
        self.optimizer = self._build_optimizer(blocks)
        # DDP's gradients are views of the buffers that it exchanges. Freed ones would be allocated again beside these
        # buffers while micro-batches accumulate. A parameter that is never used must not get a gradient, though.
        self._keeps_gradients = self.processes.world_size > 1 and not may_skip_parameters(self.module)
        return cast(nn.Module, self.accelerator.prepare_model(self.module))

    def _build_optimizer(self, blocks: list[nn.Module]) -> torch.optim.Optimizer:
        plan = self._plan
        groups = ParameterGroups.of(self.module, blocks, plan.optimizer)
        precisions = (plan.optimizer_states, plan.bf16_weights)
        self.optimizer_groups = groups.describe(plan.optimizer, plan.weight_decay, *precisions)
        return build_optimizer(
            plan.optimizer,
            self.module,
            groups,
            learning_rate=plan.learning_rate,
            weight_decay=plan.weight_decay,
            states=plan.optimizer_states,
            bf16_weights=plan.bf16_weights,
            seed=plan.seed,
        )

    def _check(self) -> None:
        world = self.processes.world_size
        replicated = DistributedType.MULTI_GPU if self.device.type == "cuda" else DistributedType.MULTI_CPU
        self._expect(replicated if world > 1 else DistributedType.NO)
        if world > 1 and not isinstance(self.model, DistributedDataParallel):
            raise CannotTrain(
                f"There are {world} processes, but Accelerate did not use DDP ({type(self.model).__name__})."
            )

    def _expect(self, expected: DistributedType) -> None:
        found, count = self.accelerator.distributed_type, self.accelerator.num_processes
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device.type != device:
            raise CannotTrain(f"Accelerate selected the device {self.device} instead of {device!r}.")
        if found != expected or count != self.processes.world_size:
            raise CannotTrain(
                f"Accelerate set up {found} with {count} processes instead of {expected} with "
                f"{self.processes.world_size}; start the script with torchrun, or with `accelerate launch` without a "
                "config."
            )

    # --- one optimizer step ---

    @contextmanager
    def micro_step(self, *, last: bool) -> Generator[None]:
        """A context for the forward and backward passes of a micro-batch; the ``last`` one exchanges gradients."""
        exchange = nullcontext() if last or self.processes.world_size == 1 else self.accelerator.no_sync(self.model)
        with exchange, self._autocast(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")  # it is intended
            yield

    @contextmanager
    def alone(self) -> Generator[nn.Module]:
        """The model for forward and backward passes of this rank that use the memory of a step but exchange nothing.

        Its gradients are meaningless. If a pass fails, the engine is as before, except for gradients.
        """
        with self._autocast():
            yield self.module

    @contextmanager
    def evaluating(self) -> Generator[nn.Module]:
        """The model for an evaluation, without dropout and gradients. Its modes are restored afterwards.

        If it is sharded, every rank must call it the same number of times.
        """
        modes = [(part, part.training) for part in self.module.modules()]
        self.module.eval()
        try:
            with torch.no_grad(), self._autocast():
                yield self.module
        finally:
            for part, mode in modes:
                part.training = mode

    def _autocast(self) -> torch.autocast:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._plan.mixed_precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def backward(self, loss: torch.Tensor) -> None:
        """``loss`` is this rank's share of the global loss; the ranks' gradients are summed (DDP takes their mean)."""
        loss = loss * self.processes.world_size
        if self.loss_scale is None:
            loss.backward()
        else:
            self.loss_scale.backward(loss)

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clip the gradient of the whole model, and return its previous norm."""
        if self.loss_scale is not None:
            self.loss_scale.unscale(self.optimizer)
        return nn.utils.clip_grad_norm_(self.module.parameters(), max_norm)

    def update(self, learning_rate: float) -> float | None:
        """Apply the update. Returns the gradient's norm if `clip` cannot; it is NaN if the update was not applied."""
        if self._is_unchanged_between_updates is None:
            self._is_unchanged_between_updates = self._writes_at_start == self._times_written()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._complete_gradients()
        if self.loss_scale is None:
            self.optimizer.step()
        else:
            self.loss_scale.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=not self._keeps_gradients)
        return None

    def _complete_gradients(self) -> None:
        """Give parameters that this step did not use a zero gradient, as a single parameter of all experts has.

        Parameters that no step has used yet have no state in the optimizer. They are left alone: not even decayed.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None and parameter in self.optimizer.state:
                    parameter.grad = torch.zeros_like(parameter)

    def back_off(self) -> float | None:
        """Drop gradients that are not finite, halve the loss scale, and return it.

        Returns None if there is no loss scale, or if it is too small to be the cause.
        """
        scale = None if self.loss_scale is None else self.loss_scale.back_off()
        if scale is not None:
            self.optimizer.zero_grad(set_to_none=True)
        return scale

    def drop_gradients(self, *, keep_storage: bool = False) -> None:
        """Drop the accumulated gradients, and release cached memory.

        With ``keep_storage``, they become zeros where `update` keeps their memory, too.
        """
        self.optimizer.zero_grad(set_to_none=not (keep_storage and self._keeps_gradients))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _times_written(self) -> list[int]:
        return [times_written(parameter) for parameter in self.module.parameters()]

    # --- state ---

    def stage_weights(self, staging: Staging, names: Collection[str]) -> Tensors:
        """Copies of the whole weights with these names, on the first rank; empty on the others.

        Parameters are copied during the next step, unless the model itself changes them between updates. Buffers (such
        as running means) are copied now, because a forward pass may change them.
        """
        if not self.processes.is_main:
            return {}
        parameters = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        weights = {name: t for name, t in self.module.state_dict().items() if name in names}
        if not self._is_unchanged_between_updates:
            return staging.copy("model/", weights)
        staged = staging.copy("model/", {name: t for name, t in weights.items() if name not in parameters})
        later = staging.copy_later("model/", {name: t for name, t in weights.items() if name in parameters})
        return {name: later[name] if name in later else staged[name] for name in weights}

    def staged_rows(self, weights: Tensors) -> dict[str, Rows] | None:
        """The rows of this rank in ``weights``, which `stage_weights` returned; None if they are whole."""
        return None

    def stage_optimizer(self, staging: Staging) -> tuple[Tensors, dict[str, Any]]:
        """Copies of this rank's part of the optimizer's state: tensors, and other values."""
        if not self.processes.is_main:
            return {}, {}
        tensors, values = optimizer_tensors(self.optimizer, self.module)
        if self.loss_scale is not None:
            values[_LOSS_SCALE] = self.loss_scale.stored()
        return staging.copy_later("optimizer/", tensors), values

    def reserve(self, staging: Staging, names: Collection[str]) -> None:
        """Allocate the buffers of the first save. Called concurrently with training, after the first update."""
        if self.processes.is_main:
            staging.reserve("model/", {name: t for name, t in self.module.state_dict().items() if name in names})
            staging.reserve("optimizer/", optimizer_tensors(self.optimizer, self.module)[0])

    def write_shard(self, folder: Path, optimizer: Tensors) -> None:
        """Write this rank's part of the optimizer's state; only on the first rank unless `writes_shards`."""
        if optimizer:
            save_file(optimizer, folder / "optimizer.safetensors")

    def write_now(self, folder: Path) -> None:
        """Write files that must be complete before training continues; none by default."""

    def restore_optimizer(self, stored: StoredState) -> None:
        values = {key: value for key, value in stored.optimizer_values.items() if key != _LOSS_SCALE}
        if self.loss_scale is not None:
            self.loss_scale.restore(stored.optimizer_values[_LOSS_SCALE])
        restore_optimizer(self.optimizer, self.module, stored.optimizer_tensors(), values)

    def close(self) -> None:
        self.accelerator.free_memory()
        AcceleratorState._reset_state(True)  # pyright: ignore[reportPrivateUsage]


Engine = Replicated
