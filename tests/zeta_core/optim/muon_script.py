"""Updates matrices with Muon on one process, or on several under DDP and FSDP2. ``muon_script.py FOLDER``

Writes the updated matrices, and the floating-point operations of each rank, to files that are named by the number of
processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from zeta_core.environment import ProcessRank
from zeta_core.optim.muon import Muon
from zeta_core.parallel.processes import Processes

SHAPES = [(96, 32)] * 5 + [(33, 64)] * 4 + [(7, 40)] * 2 + [(6, 16, 24)] * 2


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrices = nn.ParameterList([nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES])


def updated(*, sharded: bool) -> tuple[dict[str, torch.Tensor], int]:
    """The matrices after three updates, and the operations of this rank."""
    model = Matrices()
    if sharded:
        fully_shard(model)
    optimizer = Muon(list(model.parameters()), None, lr=0.02, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    with FlopCounterMode(display=False) as counter:
        for _ in range(3):
            for parameter in model.parameters():
                gradient = torch.randn(parameter.shape, generator=generator)
                if isinstance(parameter, DTensor):
                    gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
                parameter.grad = gradient
            optimizer.step()
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}
    return whole, counter.get_total_flops()


def main(folder: str) -> None:
    processes = Processes(ProcessRank.from_environment(), need_group=True)
    operations = dict[str, list[int]]()
    for strategy in ("ddp", "fsdp2"):
        whole, own = updated(sharded=strategy == "fsdp2")
        operations[strategy] = processes.gather(own)
        if processes.is_main:
            save_file(whole, Path(folder) / f"{strategy}-{processes.world_size}.safetensors")
    if processes.is_main:
        (Path(folder) / f"operations-{processes.world_size}.json").write_text(json.dumps(operations))
    processes.gather(None)
    os._exit(0)  # threads of gloo sometimes abort an interpreter that ends this early


if __name__ == "__main__":
    main(*sys.argv[1:])
