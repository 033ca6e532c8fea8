"""Under torchrun: sets up Accelerate in each way that it accepts but that does not train as requested.

``misconfigured_script.py RESULT_FILE``: the first rank writes the error of our engine for each one as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from torch import nn

from tests.zeta_core.models import plain
from tests.zeta_core.parallel.test_parallel import why_no_deepspeed
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.validation import parse
from zeta_core.environment import ProcessRank, library_environment
from zeta_core.failures import CannotTrain
from zeta_core.parallel.fsdp import FullySharded
from zeta_core.parallel.processes import Processes, Replicated
from zeta_core.parallel.zero import Zero, zero_config
from zeta_core.plan import PlanInputs, decide_plan


def new_accelerator(*args: Any, **kwargs: Any) -> Accelerator:
    AcceleratorState._reset_state(True)  # pyright: ignore[reportPrivateUsage]
    return Accelerator(*args, **kwargs)


class WithoutCpu(Replicated):
    """Each rank trains alone on all the data."""

    def _accelerator(self) -> Accelerator:
        return new_accelerator()


class OnlyBackend(Replicated):
    """Each rank trains on its share of the data, but gradients are not exchanged."""

    def _accelerator(self) -> Accelerator:
        return new_accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])


class PluginDropped(FullySharded):
    """Accelerate silently ignores the FSDP plugin and uses DDP."""

    def _accelerator(self) -> Accelerator:
        return new_accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))

    def _wrap(self, blocks: list[nn.Module]) -> nn.Module:
        return Replicated._wrap(self, blocks)


class ZeroDropped(Zero):
    """Accelerate silently ignores the DeepSpeed plugin."""

    def _accelerator(self) -> Accelerator:
        return new_accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=self._config))


class ZeroUncounted(Zero):
    """Without a named backend, Accelerate counts one process where DeepSpeed has two."""

    def _accelerator(self) -> Accelerator:
        return new_accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=self._config))


def result_of(build: Callable[[], object]) -> str:
    try:
        return f"accepted: {build()}"
    except CannotTrain as error:
        return error.message


def main(result_file: str) -> None:
    options = parse(TrainerOptions, {"batch_size": 2, "gradient_accumulate_every": 1})
    plan = decide_plan(options, PlanInputs(2, "cpu", False, 1, 256, 1, 1 << 30, True, "data"), None)
    results: dict[str, str] = {}
    with library_environment(Path("cache"), deepspeed=why_no_deepspeed() is None, cuda=False):
        processes = Processes(ProcessRank.from_environment(), need_group=True)
        results["right"] = result_of(lambda: type(Replicated(plain(), plan, processes, blocks=[]).model).__name__)
        for engine in (WithoutCpu, OnlyBackend, PluginDropped):
            results[engine.__name__] = result_of(lambda of=engine: of(plain(), plan, processes, blocks=[]))
        if why_no_deepspeed() is None:
            config = zero_config(2, plan)
            for zero in (ZeroDropped, ZeroUncounted):
                results[zero.__name__] = result_of(
                    lambda of=zero: of(plain(), plan, processes, blocks=[], config=config)
                )
        results["connected by the script"] = result_of(lambda: Processes(ProcessRank(), need_group=False))
    if dist.get_rank() == 0:
        Path(result_file).write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
