"""The check of the network between nodes, with loopback addresses as hosts."""

from __future__ import annotations

import re
import socket
from contextlib import closing

import pytest

from tests.harness.ports import free_loopback_port
from zeta_core.contract.wire.node_group import NodeGroup
from zeta_core.failures import TrainingFailed
from zeta_core.process.network_check import Responder, check_connections, describe
from zeta_core.process.node_interface import find_interface

GROUP = NodeGroup(node_rank=0, addresses=["127.0.0.2", "127.0.0.3"], port=1)
TOKEN = b"job-1"


def test_connections_are_measured_and_summarized() -> None:
    with closing(Responder("127.0.0.3", TOKEN)) as responder:
        (connection,) = check_connections(GROUP, [0, responder.port], TOKEN)
    assert connection.error is None
    summary = describe(GROUP, [connection])
    assert re.fullmatch(r"All 2 nodes .* median latency \d+\.\d\d ms \(.*node 0 to 1\), .* MB/s .*", summary), summary


def test_a_pair_that_cannot_connect_is_named() -> None:
    found = check_connections(GROUP, [0, free_loopback_port()], TOKEN)
    with pytest.raises(TrainingFailed, match=r"node 0 \(127.0.0.2\) cannot connect to node 1 \(127.0.0.3\)") as error:
        describe(GROUP, found)
    assert (error.value.code, "ZETA_WORKER_ADDRESS" in str(error.value)) == ("nodes_unreachable", True)


def test_another_program_is_not_taken_for_a_node() -> None:
    with closing(Responder("127.0.0.3", b"job-2")) as responder:
        (connection,) = check_connections(GROUP, [0, responder.port], TOKEN)
    assert connection.error is not None


def test_an_address_is_found_on_its_interface_or_rejected_with_the_known_ones() -> None:
    loopback = find_interface("127.0.0.3")
    assert loopback in {name for _, name in socket.if_nameindex()}
    with pytest.raises(TrainingFailed, match=rf"no network interface with the address 192\.0\.2\.77 .*{loopback}: "):
        find_interface("192.0.2.77")
