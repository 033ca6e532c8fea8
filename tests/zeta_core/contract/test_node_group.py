"""The hosts of a run: what a run file may contain."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from zeta_core.contract.wire.node_group import NodeGroup


def test_a_node_knows_its_address_and_where_the_nodes_meet() -> None:
    group = NodeGroup(node_rank=1, addresses=["10.0.0.5", "10.0.0.6"], port=29500)
    assert (group.num_nodes, group.address, group.rendezvous) == (2, "10.0.0.6", "10.0.0.5:29500")
    assert group.name(0) == "node 0 (10.0.0.5)"
    six = NodeGroup(node_rank=0, addresses=["fd00:0::1", "fd00::2"], port=29500)
    assert six.rendezvous == "[fd00::1]:29500"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"node_rank": 2}, "node_rank is 2, but the group has 2 nodes"),
        ({"addresses": ["10.0.0.5"]}, "at least 2 items"),
        ({"addresses": ["10.0.0.5", "worker-2"]}, "'worker-2' does not appear to be an IPv4 or IPv6 address"),
        ({"port": 0}, "greater than or equal to 1"),
    ],
)
def test_an_impossible_group_is_rejected(fields: dict[str, object], message: str) -> None:
    valid: dict[str, object] = {"node_rank": 1, "addresses": ["10.0.0.5", "10.0.0.6"], "port": 29500}
    with pytest.raises(ValidationError, match=message):
        NodeGroup.model_validate(valid | fields)
