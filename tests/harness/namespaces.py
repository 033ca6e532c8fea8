"""Hosts with a network of their own: network namespaces of this machine (Linux, as root), connected by a bridge.

    host 0 --- port 0 --- bridge (this machine, `gateway`) --- port 1 --- host 1

Their processes share the process ids and the files of this machine, so tests can signal and examine them.
"""

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager, suppress


class NamespacesUnavailable(Exception):
    """Network namespaces can't be created on this machine; the message gives the reason."""


class Namespaces:
    """``count`` hosts, numbered from 0. `addresses` are those of the hosts, and `gateway` is that of this machine."""

    def __init__(self, count: int) -> None:
        """Raises `NamespacesUnavailable`."""
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise NamespacesUnavailable("creating network namespaces needs root and iproute2")
        number = os.getpid()
        network = f"10.{208 + number // 250 % 16}.{number % 250}"
        self.gateway = f"{network}.254"
        self.addresses = [f"{network}.{host + 1}" for host in range(count)]
        self._bridge = f"zb{number}"
        self._names = [f"zeta-{number}-{host}" for host in range(count)]
        self._ports = [f"zp{number}x{host}" for host in range(count)]  # the ends of the links at the bridge
        try:
            self._create()
        except subprocess.CalledProcessError as error:
            self.close()
            raise NamespacesUnavailable(f"network namespaces can't be created: {error.stderr.strip()}") from error

    def command(self, host: int) -> tuple[str, ...]:
        """The words before a command that run it on this host, with the same process id."""
        return ("ip", "netns", "exec", self._names[host])

    def cut(self, host: int) -> None:
        """Cut the host off, as if its cable were unplugged: packets are lost, and connections stay open."""
        _ip("link", "set", self._ports[host], "down")

    def restore(self, host: int) -> None:
        _ip("link", "set", self._ports[host], "up")

    @contextmanager
    def separated(self, host: int, other: int) -> Generator[None]:
        """Within the context, the two hosts can reach all others, but not each other."""
        routes = [
            ("-n", self._names[source], "route", action, "unreachable", f"{self.addresses[target]}/32")
            for source, target in ((host, other), (other, host))
            for action in ("add", "del")
        ]
        for route in routes[::2]:
            _ip(*route)
        try:
            yield
        finally:
            for route in routes[1::2]:
                _ip(*route)

    def close(self) -> None:
        """Remove the namespaces, with their links, and the bridge."""
        for words in (*(("netns", "del", name) for name in self._names), ("link", "del", self._bridge)):
            with suppress(subprocess.CalledProcessError):
                _ip(*words)

    def _create(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.gateway}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for name, port, address in zip(self._names, self._ports, self.addresses, strict=True):
            _ip("netns", "add", name)
            _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", port, "master", self._bridge, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")


@contextmanager
def network_namespaces(count: int) -> Generator[Namespaces]:
    """Hosts until the block ends. Raises `NamespacesUnavailable`."""
    namespaces = Namespaces(count)
    try:
        yield namespaces
    finally:
        namespaces.close()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
