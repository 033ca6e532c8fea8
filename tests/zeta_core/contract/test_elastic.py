"""The numbers of machines on which an elastic job may continue divide its global batch."""

from typing import Any

import pytest

from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.resources import Elastic, Resources, elastic_faults, node_counts
from zeta_core.contract.spec.validation import parse

TWO_BY_TWO = Resources(nodes=2, processes=2)


def test_only_numbers_that_divide_the_global_batch_are_used() -> None:
    elastic = Elastic(min_nodes=1, max_nodes=4)
    assert node_counts(TWO_BY_TWO, elastic, 8) == [4, 2, 1]
    assert node_counts(TWO_BY_TWO, None, 8) == [2]
    assert not list(elastic_faults(TWO_BY_TWO, elastic, 8))


@pytest.mark.parametrize(
    ("limits", "global_batch_size", "param", "fix"),
    [
        ((3, 4), 8, "elastic", "resources.nodes is 2, which must be between min_nodes and max_nodes"),
        ((2, 3), 8, "elastic.max_nodes", "3 x 2 processes do not divide the global batch of 8 sequences equally"),
        ((1, 2), None, "elastic", "set batch_size and a number of gpus"),
    ],
)
def test_limits_that_no_attempt_can_use_are_rejected_with_the_fix(
    limits: tuple[int, int], global_batch_size: int | None, param: str, fix: str
) -> None:
    elastic = Elastic(min_nodes=limits[0], max_nodes=limits[1])
    (fault,) = elastic_faults(TWO_BY_TWO, elastic, global_batch_size)
    assert fault.param == param
    assert fix in fault.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"resources": {"nodes": 2, "gpus": "all"}}, "resources.gpus"),
        ({"use_deepspeed": True, "elastic": {"min_nodes": 1, "max_nodes": 2}}, "elastic"),
    ],
)
def test_contradictions_with_several_machines_are_rejected(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidSpec) as error:
        parse(JobSpec, {**JobSpec.placeholders, **fields})
    assert param in [detail.param for detail in error.value.details]
