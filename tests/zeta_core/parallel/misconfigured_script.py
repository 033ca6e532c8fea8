"""Under torchrun: sets up Accelerate in each way that it accepts but that does not train as requested.

``misconfigured_script.py RESULT_FILE``: what our engines answer to each, as JSON of the first rank.
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
from zeta_core.parallel.processes import Processes, Replicated
from zeta_core.parallel.sharded import Sharded
from zeta_core.parallel.zero import Zero, zero_config
from zeta_core.plan import Facts, decide_plan


def fresh(*args: Any, **kwargs: Any) -> Accelerator:
    AcceleratorState._reset_state(True)  # pyright: ignore[reportPrivateUsage]
    return Accelerator(*args, **kwargs)


class WithoutCpu(Replicated):
    """C1: each rank alone on all the data."""

    def _accelerator(self) -> Accelerator:
        return fresh()


class OnlyBackend(Replicated):
    """C3: the data shared out, and gradients never exchanged."""

    def _accelerator(self) -> Accelerator:
        return fresh(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])


class PluginDropped(Sharded):
    """C2: the plugin dropped in silence, and plain DDP."""

    def _accelerator(self) -> Accelerator:
        return fresh(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))

    def _wrap(self, blocks: list[nn.Module]) -> nn.Module:
        return Replicated._wrap(self, blocks)


class ZeroDropped(Zero):
    """C2 with DeepSpeed's plugin."""

    def _accelerator(self) -> Accelerator:
        return fresh(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=self._config))


class ZeroUncounted(Zero):
    """C4: without its backend named, Accelerate counts one process where DeepSpeed has two."""

    def _accelerator(self) -> Accelerator:
        return fresh(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=self._config))


def answer(build: Callable[[], object]) -> str:
    try:
        return f"accepted: {build()}"
    except CannotTrain as error:
        return error.message


def main(result_file: str) -> None:
    asked = parse(TrainerOptions, {"batch_size": 2, "gradient_accumulate_every": 1})
    plan = decide_plan(asked, Facts(2, "cpu", False, 1, 256, 1, 1 << 30, True, "data"), None)
    answers: dict[str, str] = {}
    with library_environment(deepspeed=why_no_deepspeed() is None, cuda=False):
        processes = Processes(ProcessRank.from_environment(), need_group=True)
        answers["right"] = answer(lambda: type(Replicated(plain(), plan, processes, blocks=[]).model).__name__)
        for engine in (WithoutCpu, OnlyBackend, PluginDropped):
            answers[engine.__name__] = answer(lambda of=engine: of(plain(), plan, processes, blocks=[]))
        if why_no_deepspeed() is None:
            config = zero_config(2, plan)
            for zero in (ZeroDropped, ZeroUncounted):
                answers[zero.__name__] = answer(lambda of=zero: of(plain(), plan, processes, blocks=[], config=config))
        answers["connected by the script"] = answer(lambda: Processes(ProcessRank(), need_group=False))
    if dist.get_rank() == 0:
        Path(result_file).write_text(json.dumps(answers))
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
