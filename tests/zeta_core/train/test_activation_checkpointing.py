"""Runs that recompute activations end with the same bits, whichever results they keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.zeta_core.models import llama
from tests.zeta_core.runs import train
from zeta_core.failures import CannotTrain
from zeta_core.model.activation_checkpointing import recomputed_activations


@pytest.mark.parametrize(
    "options",
    [{"mixed_precision": "bf16"}, pytest.param({"use_fsdp": True}, marks=pytest.mark.extended)],
    ids=["replicated", "fsdp2"],
)
def test_recomputing_activations_does_not_change_a_run(options: dict[str, Any], tmp_path: Path) -> None:
    same: dict[str, Any] = {"cache": tmp_path, "max_steps": 3, "gradient_accumulate_every": 2, **options}
    found = list[dict[str, torch.Tensor]]()
    for how in (False, True, "selective"):
        out = tmp_path / str(how)
        _, lines = train(llama(attention_dropout=0.2), out, use_activation_checkpointing=how, **same)
        assert lines.resolved_spec["use_activation_checkpointing"] == how
        found.append(load_file(out / "final" / "model.safetensors"))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], tensor) for name, tensor in other.items())


def test_offloading_the_inputs_of_blocks_is_rejected_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match="'offload', which has no effect on a CPU") as raised:
        train(llama(), tmp_path / "out", cache=tmp_path, max_steps=1, use_activation_checkpointing="offload")
    assert raised.value.param == "use_activation_checkpointing"


def test_a_block_that_changes_a_kept_result_in_place_is_rejected_with_a_fix() -> None:
    blocks: list[nn.Module] = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)) for _ in range(2)]
    with recomputed_activations(blocks, "selective"):
        loss = nn.Sequential(*blocks)(torch.ones(2, 4)).sum()
        with pytest.raises(CannotTrain, match="in place") as raised:
            loss.backward()
    assert raised.value.patch == {"use_activation_checkpointing": True}
