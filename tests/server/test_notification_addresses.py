"""Which addresses a notification may be sent to."""

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path

import pytest

from server.notifications.addresses import AddressNotAllowed, allowed_addresses, is_public
from server.settings import parse_networks


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1", "168.63.129.16"),
        *("::1", "::", "fe80::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "2002:7f00:1::", "2001::1"),
        "fec0::1",
    ],
)
def test_private_and_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.215.14", "2606:4700:4700::1111"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(ip_address(address))


def addresses(host: str, networks: str = "") -> list[str]:
    with ThreadPoolExecutor(1) as executor:
        return asyncio.run(allowed_addresses(host, 443, parse_networks(networks), executor))


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "127.0.0.1", "127.1", "0x7f000001", "2130706433", "::1", "169.254.169.254"),
        *("::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe"),
    ],
)
def test_every_spelling_of_a_private_address_is_refused(host: str) -> None:
    with pytest.raises(AddressNotAllowed, match="ZETA_WEBHOOK_NETWORKS"):
        addresses(host)


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces exist only on Linux")
def test_the_own_public_address_is_refused_unless_an_operator_allows_it(tmp_path: Path) -> None:
    """In a network namespace of its own, whose interface gets a public address."""
    program = (
        "from tests.server.test_notification_addresses import addresses, AddressNotAllowed\n"
        "print(addresses('93.184.215.14', '93.184.215.14/32'), addresses('93.184.215.15'))\n"
        "try: addresses('93.184.215.14')\n"
        "except AddressNotAllowed: print('refused')\n"
    )
    give_address = 'ip address add 93.184.215.14/32 dev lo && exec "$0" -c "$1"'
    command = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", give_address, sys.executable, program]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    if "unshare" in ran.stderr or "ip: " in ran.stderr:
        pytest.skip(f"no network namespace: {ran.stderr[:200]}")
    assert ran.stdout == "['93.184.215.14'] ['93.184.215.15']\nrefused\n", ran.stderr


def test_an_operator_can_allow_a_network() -> None:
    assert addresses("127.0.0.1", "10.0.0.0/8, 127.0.0.1") == ["127.0.0.1"]
    assert addresses("::ffff:127.0.0.1", "127.0.0.0/8") == ["::ffff:7f00:1"]
    with pytest.raises(AddressNotAllowed):
        addresses("127.0.0.2", "127.0.0.1")


def test_a_public_literal_address_is_allowed() -> None:
    assert addresses("1.1.1.1") == ["1.1.1.1"]
