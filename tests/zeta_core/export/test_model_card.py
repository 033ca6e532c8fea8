"""The README of an exported adapter has a command for vLLM only if vLLM can load the adapter."""

from typing import Any

import pytest

from zeta_core.contract.identifiers import new_id
from zeta_core.contract.spec.export_spec import ExportSpec
from zeta_core.contract.spec.validation import parse
from zeta_core.export.model_card import adapter_part

SPEC = parse(ExportSpec, {"model": {"job": new_id("job"), "checkpoint": "final"}, "to": "adapter"})


@pytest.mark.parametrize(("rank", "allowed"), [(4, 8), (16, 16), (65, 128)])
def test_the_command_for_vllm_has_the_smallest_rank_that_it_accepts(rank: int, allowed: int) -> None:
    part = adapter_part(SPEC, None, {"r": rank, "modules_to_save": None, "target_parameters": None})
    assert part is not None
    assert f"--max-lora-rank {allowed} " in part


@pytest.mark.parametrize(
    "config",
    [{"r": 1000}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_parameters": ["experts.down_proj"]}],
)
def test_an_adapter_that_vllm_may_not_load_has_no_command(config: dict[str, Any]) -> None:
    assert adapter_part(SPEC, None, {"r": 8, **config}) is None
