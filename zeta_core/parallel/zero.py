"""DeepSpeed ZeRO 1, 2 and 3 through Accelerate, on GPUs and, over gloo, on CPU processes.

DeepSpeed clips, checks for overflow and applies the update in one call. If a gradient is not finite, the update is not
applied, and the run ends. DeepSpeed writes its own files and reads them with pickle. They are read only from a
checkpoint whose manifest was verified, and only with the number of processes that wrote them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from torch import nn

from zeta_core.checkpoint.staging import Staging, Tensors
from zeta_core.checkpoint.training_state import StoredState
from zeta_core.contract.spec.deepspeed import DEFAULT_STAGE, requested_zero_stage
from zeta_core.failures import CannotResume, CannotTrain
from zeta_core.parallel.data_dependence import has_data_dependent_path
from zeta_core.parallel.processes import Replicated
from zeta_core.plan import Plan
from zeta_core.system.allocator import giving_freed_memory_back

_TAG = "deepspeed"
_COMPUTED_IN = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STAGE = "zero_stage"  # key in the optimizer's values


def zero_config(option: bool | int | dict[str, Any] | str, plan: Plan) -> dict[str, Any]:
    """DeepSpeed's config for ``use_deepspeed``. Raises `CannotTrain` if it contradicts the plan."""
    if isinstance(option, str):
        try:
            config = cast("dict[str, Any]", json.loads(Path(option).read_text()))
        except (OSError, ValueError) as error:
            raise CannotTrain(f"use_deepspeed is {option!r}, which is not a readable JSON file: {error}") from error
    elif isinstance(option, dict):
        config = dict(option)
    else:
        config = {"zero_optimization": {"stage": requested_zero_stage(option)}}
    planned: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulate_every,
        "train_batch_size": plan.batch_size * plan.gradient_accumulate_every * plan.world_size,
        "gradient_clipping": plan.max_grad_norm,
    }
    for name, value in planned.items():
        if config.get(name, "auto") not in ("auto", value):
            raise CannotTrain(f"use_deepspeed sets {name} to {config[name]}, but the Trainer uses {value}; omit it.")
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise CannotTrain(f"use_deepspeed has a section {name!r}; remove it, and pass its settings to the Trainer.")
    for name in ("bf16", "fp16"):
        section = cast("dict[str, Any]", config.get(name) or {})
        if section.get("enabled") not in (None, False, "auto") and plan.mixed_precision != name:
            raise CannotTrain(
                f"use_deepspeed enables {name}, but mixed_precision is {plan.mixed_precision!r}; remove it, and "
                "pass mixed_precision to the Trainer."
            )
    zero = {"stage": DEFAULT_STAGE, **cast("dict[str, Any]", config.get("zero_optimization") or {})}
    if zero["stage"] not in (1, 2, 3):
        raise CannotTrain(f"use_deepspeed has ZeRO stage {zero['stage']}; use 1, 2 or 3.")
    zero["stage3_gather_16bit_weights_on_model_save"] = True
    half = {"bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True}}}.get(plan.mixed_precision, {})
    fixed = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "steps_per_print": 1 << 30}
    return {**config, **planned, **half, **fixed}


class _WithGradients(torch.autograd.Function):
    """Returns ``loss``; its gradients for the parameters are the given ones, which are already scaled by ``scale``."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, loss: torch.Tensor, scale: float, gradients: list[torch.Tensor], *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.scale, ctx.gradients = scale, gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        factor = grad_loss / ctx.scale
        return None, None, None, *(gradient * factor.to(gradient.dtype) for gradient in ctx.gradients)


class Zero(Replicated):
    """The model under a DeepSpeed engine.

    With stage 2, ranks may use different parameters. A parameter that no rank used has a zero gradient from the first
    step on, so weight decay shrinks even one that is never used.
    """

    def __init__(self, *args: Any, config: dict[str, Any], **kwargs: Any) -> None:
        self._config = config
        self._deepspeed: Any = None
        self.stage = int(config["zero_optimization"]["stage"])
        super().__init__(*args, **kwargs)

    def _accelerator(self) -> Accelerator:
        AcceleratorState._reset_state(True)  # pyright: ignore[reportPrivateUsage]
        plugin = DeepSpeedPlugin(hf_ds_config=self._config)
        handlers = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
        return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=cast(Any, handlers))

    def _wrap(self, blocks: list[nn.Module]) -> nn.Module:
        may_differ = self.processes.world_size > 1 and has_data_dependent_path(self.module)
        self._has_data_dependent_path = may_differ and self.stage == 2
        if may_differ and self.stage != 2:
            self.caution = (
                f"With ZeRO {self.stage}, all processes must use the same parameters in every step. If "
                f"{type(self.module).__name__} chooses experts, blocks or branches by its data, set use_deepspeed to 2 "
                "or use use_fsdp."
            )
        self.optimizer = self._build_optimizer(blocks)  # first, because it depends on the shapes of whole parameters
        if self.stage == 3:
            with giving_freed_memory_back():  # otherwise, freed whole weights would leave gaps between the parts
                self._divide_weights()
        else:
            self.module.to(self.device)
        self._deepspeed, self.optimizer = self.accelerator.prepare(self.module, self.optimizer)
        # Calling the engine adds hooks to the result of forward, which would also run in `_with_every_gradient`.
        return self.module if self._has_data_dependent_path else cast(nn.Module, self._deepspeed)

    def _divide_weights(self) -> None:
        """Keep this rank's part of each parameter, in the precision of the computation, one module after the other.

        The whole model is never in the memory of a process if its weights are memory-mapped.
        """
        from deepspeed import zero

        dtype = _COMPUTED_IN[self._plan.mixed_precision]
        for part in reversed(list(self.module.modules())):  # the parts of a module before the module itself
            own = [parameter for parameter in part.parameters(recurse=False) if not hasattr(parameter, "ds_id")]
            for parameter in own:
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
            if own:
                zero.Init(module=part, config_dict_or_path=self._config, dtype=dtype, mem_efficient_linear=False)
        for part in self.module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(self.device))

    def _check(self) -> None:
        from deepspeed import DeepSpeedEngine

        self._expect(DistributedType.DEEPSPEED)
        if not isinstance(self._deepspeed, DeepSpeedEngine):
            raise CannotTrain(
                f"use_deepspeed is set, but DeepSpeed did not wrap the model ({type(self._deepspeed).__name__})."
            )
        engine = self._deepspeed
        if engine.zero_optimization_stage() != self.stage or engine.world_size != self.processes.world_size:
            raise CannotTrain(
                f"DeepSpeed set up ZeRO {engine.zero_optimization_stage()} on {engine.world_size} processes instead of "
                f"ZeRO {self.stage} on {self.processes.world_size}."
            )
        accumulates = engine.gradient_accumulation_steps()
        if accumulates != self._plan.gradient_accumulate_every:
            raise CannotTrain(
                f"DeepSpeed accumulates {accumulates} micro-batches instead of {self._plan.gradient_accumulate_every}."
            )

    @contextmanager
    def micro_step(self, *, last: bool) -> Generator[None]:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._last = last
        yield

    @contextmanager
    def evaluating(self) -> Generator[nn.Module]:
        with super().evaluating():
            self.model.eval()
            try:
                yield self.model  # calling it gathers the shards
            finally:
                self.model.train()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)  # DeepSpeed's config sets the precision

    def backward(self, loss: torch.Tensor) -> None:
        engine = self._deepspeed
        loss = loss * self.processes.world_size
        if self._has_data_dependent_path:
            loss = self._with_every_gradient(loss)
            engine._backward_prologue()  # a hook runs it if the engine itself is called
        engine.backward(loss, scale_wrt_gas=False)
        if not self._last:
            engine.step()  # counts the micro-step; `update` applies the update

    def _with_every_gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """A loss of the same value whose backward pass yields all gradients in a fixed order, unused ones as zeros.

        DeepSpeed reduces gradients as they arrive, so ranks must not differ in which arrive, or in which order.
        """
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        scale = float(getattr(self._deepspeed.optimizer, "loss_scale", 1.0))  # of fp16, against underflow
        found = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
        pairs = zip(parameters, cast("tuple[torch.Tensor | None, ...]", found), strict=True)
        gradients = [torch.zeros_like(parameter) if gradient is None else gradient for parameter, gradient in pairs]
        return cast(torch.Tensor, _WithGradients.apply(loss.detach(), scale, gradients, *parameters))

    def clip(self, max_norm: float) -> torch.Tensor:
        """Return zero, because DeepSpeed clips in its step."""
        return torch.zeros((), device=self.device)

    def update(self, learning_rate: float) -> float | None:
        engine = self._deepspeed
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        engine.step()
        if getattr(engine.optimizer, "overflow", False):
            return math.nan  # the update was not applied
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    # --- state ---

    def stage_weights(self, staging: Staging, names: Collection[str]) -> Tensors:
        whole = cast("dict[str, torch.Tensor]", self.accelerator.get_state_dict(self._deepspeed))
        masters = self._masters()
        if not self.processes.is_main:
            return {}
        whole |= masters
        return staging.copy("model/", {name: tensor for name, tensor in whole.items() if name in names})

    def _masters(self) -> Tensors:
        """The float32 weights that DeepSpeed updates, on the first rank; empty if the model itself is in float32.

        All ranks must call it, because each of them has a part.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        masters: Tensors = {}
        if self._plan.mixed_precision == "no":
            return masters
        for name, parameter in self.module.named_parameters():
            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if master is not None and self.processes.is_main:
                masters[name] = master.cpu()
        return masters

    def reserve(self, staging: Staging, names: Collection[str]) -> None:
        """Do nothing, because whole weights exist only while a save gathers them."""

    def stage_optimizer(self, staging: Staging) -> tuple[Tensors, dict[str, Any]]:
        return {}, {_STAGE: self.stage}

    def write_now(self, folder: Path) -> None:
        frozen = any(not parameter.requires_grad for parameter in self.module.parameters())
        engine = self._deepspeed
        engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=frozen)
        if self.processes.is_main:
            for script in folder.glob("*.py"):  # DeepSpeed leaves its converters in every checkpoint
                script.unlink()

    def restore_optimizer(self, stored: StoredState) -> None:
        stage = stored.optimizer_values.get(_STAGE, self.stage)
        if stage != self.stage:
            raise CannotResume(
                f"use_deepspeed has ZeRO {self.stage}, but the run was started with ZeRO {stage}; use that stage, or "
                "start from the weights with the checkpoint's directory as model."
            )
        if stored.plan["world_size"] != self.processes.world_size:
            raise CannotResume(
                f"The run was saved by {stored.plan['world_size']} processes with ZeRO, and only the same number can "
                "resume it; use that number, or start from the weights with the checkpoint's directory as model."
            )
        # Not strict, because these files do not contain frozen weights.
        path, _ = self._deepspeed.load_checkpoint(
            str(stored.folder), tag=_TAG, load_lr_scheduler_states=False, load_module_strict=False
        )
        if path is None:
            raise CannotResume(f"DeepSpeed found no state in {stored.folder}.")
