"""The check of the network between nodes, with loopback addresses as hosts."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness.namespaces import Namespaces
from tests.harness.ports import free_loopback_port
from zeta_core.contract.wire.node_group import NodeGroup
from zeta_core.failures import NodesUnreachable
from zeta_core.process.network_check import Responder, check_connections, describe
from zeta_core.process.node_interface import find_interface, interface_variables

GROUP = NodeGroup(node_rank=0, addresses=["127.0.0.2", "127.0.0.3"], port=1)
TOKEN = b"job-1"
PROGRAM = Path(__file__).with_name("network_check_program.py")


def test_connections_are_measured_and_summarized() -> None:
    with closing(Responder("127.0.0.3", TOKEN)) as responder:
        (connection,) = check_connections(GROUP, [0, responder.port], TOKEN)
    assert connection.error is None
    summary = describe(GROUP, [connection])
    assert re.fullmatch(r"All 2 nodes .* median latency \d+\.\d\d ms \(.*node 0 to 1\), .* MB/s .*", summary), summary


def test_a_pair_that_cannot_connect_is_named() -> None:
    found = check_connections(GROUP, [0, free_loopback_port()], TOKEN)
    with pytest.raises(NodesUnreachable, match=r"node 0 \(127.0.0.2\) cannot connect to node 1 \(127.0.0.3\)") as error:
        describe(GROUP, found)
    assert (error.value.code, "ZETA_WORKER_ADDRESS" in str(error.value)) == ("nodes_unreachable", True)


def test_another_program_is_not_taken_for_a_node() -> None:
    with closing(Responder("127.0.0.3", b"job-2")) as responder:
        (connection,) = check_connections(GROUP, [0, responder.port], TOKEN)
    assert connection.error is not None


def test_an_address_is_found_on_its_interface_or_rejected_with_the_known_ones() -> None:
    loopback = find_interface("127.0.0.3")
    assert loopback in {name for _, name in socket.if_nameindex()}
    with pytest.raises(NodesUnreachable, match=rf"no network interface with the address 192\.0\.2\.77 .*{loopback}: "):
        find_interface("192.0.2.77")


def test_gloo_and_nccl_use_the_interface_of_the_address_unless_the_operator_chose_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loopback = find_interface("127.0.0.3")
    variables = {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": f"={loopback}"}
    assert interface_variables("127.0.0.3") == variables
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert interface_variables("127.0.0.3") == {"GLOO_SOCKET_IFNAME": loopback}


@pytest.mark.extended
def test_all_nodes_name_the_pair_of_hosts_that_cannot_connect(namespaces: Namespaces) -> None:
    addresses = namespaces.addresses[:3]
    with namespaces.separated(1, 2):
        nodes = [
            subprocess.Popen(
                [*namespaces.command(node), sys.executable, PROGRAM, str(node), *addresses],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for node in range(len(addresses))
        ]
        try:
            found = [node.stdout.readline().split(": ", 1) for node in nodes if node.stdout is not None]
        finally:
            for node in nodes:
                node.kill()
                node.communicate()
    assert [interface for interface, _ in found] == ["eth0"] * 3
    expected = [
        rf"node {source} \({addresses[source]}\) cannot connect to node {target}" for source, target in ((1, 2), (2, 1))
    ]
    for _, error in found:
        assert all(re.search(pattern, error) for pattern in expected), error
        assert "node 0" not in error
