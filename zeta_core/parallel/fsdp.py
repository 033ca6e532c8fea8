"""FSDP2: every process keeps a shard of each parameter, its gradient and its optimizer state.

Torch's ``fully_shard`` is applied to each repeated block and then to the rest (embedding, head and last norm are one
group, so tied weights stay tied). A single process is allowed. With ``fsdp_shards``, each group of that many
consecutive ranks has a copy of the model (HSDP): gradients are also summed over the groups, and the first group writes
the checkpoints. All ranks that write put their rows of the weights into one file (`checkpoint.row_file`). Each of them
writes its shard of the optimizer's state to a safetensors file of its own, whose header contains the first row of each
shard; any number of ranks can read the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor

from zeta_core.checkpoint.row_file import Rows
from zeta_core.checkpoint.staging import Staging, Tensors
from zeta_core.checkpoint.training_state import StoredState, optimizer_tensors
from zeta_core.failures import CannotResume, CannotTrain
from zeta_core.optim.shards import first_row, sharded_like
from zeta_core.parallel.data_dependence import has_data_dependent_path
from zeta_core.parallel.deferred_weights import allocate, copy_rows
from zeta_core.parallel.own_shard import OwnGradientOnly, OwnShardOnly
from zeta_core.parallel.processes import Replicated
from zeta_core.plan import Plan


class FullySharded(Replicated):
    """The engine of ``use_fsdp``: the model is split over all processes."""

    writes_shards = True

    def _wrap(self, blocks: list[nn.Module]) -> nn.Module:
        if self._plan.mixed_precision == "fp16":
            raise CannotTrain("mixed_precision is 'fp16', for which use_fsdp has no loss scaling; use 'bf16' or 'no'.")
        names = [name for name, _ in self.module.named_parameters()]
        scalar = next((name for name, parameter in self.module.named_parameters() if not parameter.dim()), None)
        if scalar is not None:
            raise CannotTrain(f"use_fsdp cannot shard {scalar}, which is a single number; give it the shape (1,).")
        # Determined first, because `fully_shard` replaces the classes of the modules.
        self._has_data_dependent_path = self.processes.world_size > 1 and has_data_dependent_path(self.module)
        shard(self.module, blocks, self._mesh(), self._plan)
        self._read_weights()
        self._prepare_for_unused_parameters()
        if names != [name for name, _ in self.module.named_parameters()]:
            raise CannotTrain(
                "use_fsdp would break tied parameters inside the repeated blocks; tie only weights outside of them."
            )
        self.optimizer = self._build_optimizer(blocks)
        if self._plan.fsdp_cpu_offload:
            self.optimizer_groups += " It runs on the CPU, and all shards are in the memory of the host."
        return self.module

    def _mesh(self) -> DeviceMesh:
        """All ranks in one dimension; with several copies of the model, a row of consecutive ranks for each copy."""
        world, shards = self.processes.world_size, self.num_shards
        if world % shards:
            raise CannotTrain(
                f"fsdp_shards is {shards}, which does not divide the {world} processes of this run; use a divisor, or "
                "omit it.",
                param="fsdp_shards",
            )
        if shards == world:
            return init_device_mesh(self.device.type, (world,))
        return init_device_mesh(self.device.type, (world // shards, shards), mesh_dim_names=("replicate", "shard"))

    @property
    def _is_in_first_copy(self) -> bool:
        return self.processes.rank < self.num_shards

    def _read_weights(self) -> None:
        """Read this rank's rows of the weights that were deferred, one after the other."""
        weights = self._deferred
        if weights is None:
            return
        allocate(self.module, self.device, parameters_on_host=self._plan.fsdp_cpu_offload)
        for name, parameter in self.module.named_parameters():
            assert isinstance(parameter, DTensor)
            copy_rows(parameter.to_local(), weights.pop(name)(self.device), first_row(parameter))

    def _check(self) -> None:
        world = self.processes.world_size
        replicated = DistributedType.MULTI_GPU if self.device.type == "cuda" else DistributedType.MULTI_CPU
        self._expect(replicated if world > 1 else DistributedType.NO)
        unsharded = [
            name
            for name, parameter in self.module.named_parameters()
            if not isinstance(parameter, DTensor) or parameter.device_mesh.size() != world
        ]
        if not isinstance(self.model, FSDPModule) or unsharded:
            raise CannotTrain(
                f"use_fsdp did not shard the model {type(self.model).__name__}: {unsharded[:3]} are not sharded."
            )

    # --- one optimizer step ---

    def _prepare_for_unused_parameters(self) -> None:
        """Make the ranks' collectives equal although they use different parameters, and observe which are used.

        If the model chooses its path by the data, all of it is gathered before a forward and stays until the gradients
        are reduced. Gradients and optimizer state are sharded in any case.
        """
        root = cast(FSDPModule, self.module)
        if hasattr(root, "set_reduce_scatter_unused_params"):
            root.set_reduce_scatter_unused_params(True)
        elif self._has_data_dependent_path:
            raise CannotTrain(
                f"use_fsdp cannot train {type(self.module).__name__} on several processes with torch "
                f"{torch.__version__}, because the model may choose its path by its data.",
                hint="Install torch 2.13 or newer, or train without use_fsdp.",
            )
        if self._has_data_dependent_path:
            root.set_reshard_after_forward(False)
        self._used: set[str] = set()  # parameters with a gradient on this rank, in any step so far
        for part in self._parts():  # one after the other, so the whole model never exists
            part.unshard()
            for name, parameter in self.module.named_parameters():
                if parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.register_post_accumulate_grad_hook(self._usage_hook(name))
            part.reshard()

    def _usage_hook(self, name: str) -> Callable[[torch.Tensor], None]:
        return lambda parameter: self._used.add(name)

    def _parts(self) -> list[FSDPModule]:
        """The sharded modules, in the same order on every rank."""
        return [part for part in self.module.modules() if isinstance(part, FSDPModule)]

    @contextmanager
    def micro_step(self, *, last: bool) -> Generator[None]:
        """Reduce the gradients of each micro-batch, because unreduced ones would have the size of the whole model.

        With `fsdp_keep_gradients`, they accumulate unreduced in float32, and the ``last`` micro-batch reduces them.
        """
        root = cast(FSDPModule, self.module)
        if self._plan.fsdp_keep_gradients and not self._has_data_dependent_path:
            root.set_requires_gradient_sync(last)
        if not self._has_data_dependent_path:
            yield
            return
        for part in self._parts():
            part.unshard()
        root.set_reshard_after_backward(False)
        root.set_requires_gradient_sync(False)
        yield
        if last:
            root.set_reshard_after_backward(True)
            root.set_requires_gradient_sync(True)
            # The end of a backward pass reduces whatever is not reduced yet, part by part in a fixed order.
            root._get_fsdp_state()._root_post_backward_final_callback()  # pyright: ignore[reportPrivateUsage]

    @contextmanager
    def alone(self) -> Generator[nn.Module]:
        root, used = cast(FSDPModule, self.module), set(self._used)
        self._exchange_with(OwnShardOnly(), OwnGradientOnly())
        try:
            with self.micro_step(last=True):
                yield self.module
        except BaseException:
            root.reset_iter_state()
            root.set_reshard_after_backward(True)
            root.set_requires_gradient_sync(True)
            raise
        finally:
            self._exchange_with(DefaultAllGather(), DefaultReduceScatter())
            self._used = used

    def _exchange_with(self, all_gather: AllGather, reduce_scatter: ReduceScatter) -> None:
        for part in self._parts():
            part.set_custom_all_gather(all_gather)
            part.set_custom_reduce_scatter(reduce_scatter)

    @contextmanager
    def evaluating(self) -> Generator[nn.Module]:
        if self._has_data_dependent_path:
            for part in self._parts():
                part.unshard()
        with super().evaluating() as model:
            try:
                yield model
            finally:
                for part in self._parts():
                    part.reshard()  # no backward pass reshards after this forward

    def _complete_gradients(self) -> None:
        """Every parameter has a gradient, because unused ones are reduced as zeros. Drop those of never used ones."""
        state = self.optimizer.state
        new = {n: p for n, p in self.module.named_parameters() if p.requires_grad and p not in state}
        if not new:
            return
        used = torch.tensor([float(name in self._used) for name in new], device=self.device)
        for parameter, times in zip(new.values(), self.processes.sum(used), strict=True):
            if not times:
                parameter.grad = None

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)  # the policy of `fully_shard` has the precision

    def clip(self, max_norm: float) -> torch.Tensor:
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # --- state ---

    def stage_weights(self, staging: Staging, names: Collection[str]) -> Tensors:
        """Copies of this rank's rows of the weights; those that are not sharded are on the first rank only.

        On several nodes, which share no files, the first rank gets the whole weights, gathered one at a time.
        """
        state = {name: tensor for name, tensor in self.module.state_dict().items() if name in names}
        if self.processes.num_nodes > 1:
            self._staged = None
            return self._gathered(staging, state)
        self._staged: dict[str, Rows] | None = {
            name: Rows(first_row(t) if isinstance(t, DTensor) else 0, tuple(t.shape), t.dtype, None)
            for name, t in state.items()
        }
        local: Tensors = {}
        if self._is_in_first_copy:
            local = {name: t.to_local() for name, t in state.items() if isinstance(t, DTensor)}
        if self.processes.is_main:
            local |= {name: t for name, t in state.items() if not isinstance(t, DTensor)}
        return staging.copy("model/", local)

    def _gathered(self, staging: Staging, state: dict[str, torch.Tensor]) -> Tensors:
        staged: Tensors = {}
        for name, tensor in state.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.processes.is_main:
                staged |= staging.copy("model/", {name: whole})
        return staged

    def staged_rows(self, weights: Tensors) -> dict[str, Rows] | None:
        if self._staged is None:
            return None
        return {name: replace(rows, values=weights.get(name)) for name, rows in self._staged.items()}

    def reserve(self, staging: Staging, names: Collection[str]) -> None:
        """Do nothing: the first save allocates its buffers, which have the size of a shard."""

    def stage_optimizer(self, staging: Staging) -> tuple[Tensors, dict[str, Any]]:
        tensors, values = optimizer_tensors(self.optimizer, self.module)
        local = {key: t.to_local() if isinstance(t, DTensor) else t for key, t in tensors.items()}
        self._rows = {key: first_row(t) for key, t in tensors.items() if isinstance(t, DTensor)}
        return staging.copy_later("optimizer/", local), values

    def write_shard(self, folder: Path, optimizer: Tensors) -> None:
        if not self._is_in_first_copy:
            return
        processes = self.processes
        file = folder / f"optimizer-{processes.rank + 1:05d}-of-{self.num_shards:05d}.safetensors"
        held = {key: tensor for key, tensor in optimizer.items() if key in self._rows or processes.is_main}
        save_file(held, file, metadata={"first_rows": json.dumps(self._rows)})

    def restore_optimizer(self, stored: StoredState) -> None:
        """Read this rank's rows of every tensor, from any number of files."""
        parts = _ShardFiles(sorted(stored.folder.glob("optimizer-*-of-*.safetensors")))
        parameters = dict(self.module.named_parameters())
        state = cast("dict[Any, dict[str, Any]]", self.optimizer.state)
        for key in parts.keys:
            name, _, entry = key.rpartition("/")
            parameter = parameters.get(name)
            if not isinstance(parameter, DTensor):
                raise CannotResume(f"The optimizer's state contains {name!r}, which the model does not have.")
            if key not in parts.sharded:
                value = parts.whole(key)
                fused = any(group.get("fused") for group in self.optimizer.param_groups)
                state[parameter][entry] = value.to(parameter.device) if fused else value
                continue
            local = parts.rows(key, first_row(parameter), parameter.to_local().shape[0])
            state[parameter][entry] = sharded_like(local.to(parameter.device), parameter)
        for key, value in stored.optimizer_values.items():
            name, _, entry = key.rpartition("/")
            state[parameters[name]][entry] = value


def shard(module: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, plan: Plan) -> None:
    """Shard the parameters of each block, and then the others, over the processes of ``mesh``, in place."""
    half = torch.bfloat16 if plan.mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    offloading = OffloadPolicy()
    if plan.fsdp_cpu_offload:  # pinned memory can be copied while the GPU computes
        offloading = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for block in blocks:
        if block is not module:
            fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offloading)
    fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offloading)


class _ShardFiles:
    """The files that were written by all ranks."""

    def __init__(self, files: list[Path]) -> None:
        self._at: dict[str, list[tuple[int, Path]]] = {}
        self.sharded: set[str] = set()
        for file in files:
            with safe_open(file, framework="pt") as part:
                first_rows = cast("dict[str, int]", json.loads((part.metadata() or {}).get("first_rows", "{}")))
                for key in part.keys():  # noqa: SIM118 - not a mapping
                    self._at.setdefault(key, []).append((first_rows.get(key, 0), file))
                    if key in first_rows:
                        self.sharded.add(key)
        self.keys = sorted(self._at)

    def whole(self, key: str) -> torch.Tensor:
        with safe_open(self._at[key][0][1], framework="pt") as part:
            return part.get_tensor(key)

    def rows(self, key: str, first: int, num_rows: int) -> torch.Tensor:
        """``num_rows`` rows from row ``first``."""
        pieces: list[torch.Tensor] = []
        wanted = range(first, first + num_rows)
        for start, file in sorted(self._at[key], key=lambda at: at[0]):
            with safe_open(file, framework="pt") as part:
                held = part.get_slice(key)
                overlap = range(max(start, wanted.start), min(start + held.get_shape()[0], wanted.stop))
                if len(overlap) or not pieces:  # the first piece gives an empty shard its shape
                    at = overlap.start - start if len(overlap) else 0
                    pieces.append(held[at : at + len(overlap)])
        tensor = torch.cat(pieces)
        if len(tensor) != num_rows:
            raise CannotResume(f"{key} has {len(tensor)} of the {num_rows} rows that this process needs.")
        return tensor
