"""The hosts of a run that uses several: their order, their addresses, and where they meet."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_NODES = 1024
_INTERFACE = re.compile(r"[A-Za-z0-9._-]{1,15}")  # at most IFNAMSIZ - 1 characters


def _as_ip_address(value: str) -> str:
    """The address in its usual notation; the zone of an IPv6 address must look like the name of an interface.

    `ip_address` accepts any text as a zone, also control characters. Raises `ValueError`.
    """
    address = str(ip_address(value))
    zone = address.partition("%")[2]
    if zone and _INTERFACE.fullmatch(zone) is None:
        raise ValueError("the zone after % is not the name of a network interface")
    return address


NodeAddress = Annotated[str, AfterValidator(_as_ip_address)]  # IPv4 or IPv6, without brackets


class NodeGroup(BaseModel):
    """The nodes of one attempt, and the position of one of them. All nodes get the same group except for `node_rank`.

    A node is one worker with its processes, all of which have the same number of them (`RunFile.processes`). Node 0
    opens the rendezvous on its ``port``; every node must reach every other one at its address, on any port. The ranks
    of the processes follow the order of the nodes: those of node 1 come after those of node 0.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    node_rank: int = Field(ge=0)
    addresses: list[NodeAddress] = Field(min_length=2, max_length=MAX_NODES)  # by node rank
    port: int = Field(ge=1, le=65535)  # of the rendezvous, on the first address

    @model_validator(mode="after")
    def _is_member(self) -> Self:
        if self.node_rank >= len(self.addresses):
            raise ValueError(f"node_rank is {self.node_rank}, but the group has {len(self.addresses)} nodes")
        return self

    @property
    def num_nodes(self) -> int:
        return len(self.addresses)

    @property
    def address(self) -> str:
        """The address of this node."""
        return self.addresses[self.node_rank]

    @property
    def rendezvous(self) -> str:
        """The address and port of the rendezvous, as ``host:port``."""
        host = self.addresses[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def name(self, node_rank: int) -> str:
        """A node as messages name it."""
        return f"node {node_rank} ({self.addresses[node_rank]})"

    def title(self, node_rank: int) -> str:
        """The name of a node at the beginning of a sentence."""
        return f"Node {node_rank} ({self.addresses[node_rank]})"
