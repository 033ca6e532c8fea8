"""``offload_script.py CASE ...``: prints, for each case, the estimate and the peaks of a step on a fake GPU, as JSON.

A case is a JSON object of options. The last line contains where the shards are.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.harness.fake_accelerator import fake_gpu
from tests.harness.fake_training import fake_process_group, peaks_of_a_rank
from tests.zeta_core.memory.test_estimates import SMALL, run_of
from zeta_core.memory.estimate import building, estimate_run
from zeta_core.memory.fused_attention import single_documents
from zeta_core.model.activation_checkpointing import repeated_blocks
from zeta_core.optim.shards import first_row, local_part, sharded_like
from zeta_core.parallel.deferred_weights import allocate, copy_rows
from zeta_core.parallel.fsdp import shard


def main(cases: list[dict[str, Any]]) -> None:
    device = fake_gpu()
    for options in cases:
        located, plan = run_of(SMALL, **options)
        estimate = estimate_run(building(located), plan, on_gpu=True)
        print(json.dumps({"estimate": estimate.model_dump(), "peaks": peaks_of_a_rank(located, plan, device)}))
    print(json.dumps(places_after_loading(device)))


def places_after_loading(device: torch.device) -> dict[str, list[str]]:
    """The device types of a model whose weights are read after it was sharded, and of optimizer state that is read."""
    located, plan = run_of(SMALL, use_fsdp=True, processes=2, fsdp_cpu_offload=True)
    model = building(located)(plan)
    with fake_process_group(plan.world_size, device), ExitStack() as stack:
        mesh = init_device_mesh(device.type, (plan.world_size,))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(single_documents())
        for part in model.modules():
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
        shard(model, repeated_blocks(model), mesh, plan)
        allocate(model, device, parameters_on_host=plan.fsdp_cpu_offload)
        found: dict[str, set[str]] = {"parameters": set(), "states": set(), "gathered": set()}
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            copy_rows(parameter.to_local(), torch.empty(parameter.shape, device=device), first_row(parameter))
            found["parameters"].add(parameter.to_local().device.type)
            found["gathered"].add(parameter.full_tensor().device.type)
            found["states"].add(
                local_part(sharded_like(torch.empty(parameter.to_local().shape), parameter)).device.type
            )
        found["buffers"] = {buffer.device.type for buffer in model.buffers()}
        with device:
            loss = model(input_ids=torch.zeros(1, 8, dtype=torch.long), use_cache=False).logits.sum()
        found["logits"] = {loss.device.type}
        loss.backward()
        found["gradients"] = {local_part(p.grad).device.type for p in model.parameters() if p.grad is not None}
    return {name: sorted(types) for name, types in found.items()}


if __name__ == "__main__":
    main([json.loads(argument) for argument in sys.argv[1:]])
