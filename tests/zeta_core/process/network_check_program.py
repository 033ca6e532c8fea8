"""``network_check_program.py NODE_RANK ADDRESS ...``: check the network of one node, as the launcher of a run does.

It prints the node's interface and the result of the check, and exits when its standard input is closed.
"""

import sys

from zeta_core.contract.wire.node_group import NodeGroup
from zeta_core.failures import NodesUnreachable
from zeta_core.process.node_interface import find_interface
from zeta_core.process.node_link import NodeLink

PORT = 29400

if __name__ == "__main__":
    group = NodeGroup(node_rank=int(sys.argv[1]), addresses=sys.argv[2:], port=PORT)
    link = NodeLink(group, "job_1-1")
    link.connect()
    try:
        result = link.check_network()
    except NodesUnreachable as error:
        result = error.message
    print(f"{find_interface(group.address)}: {result}", flush=True)
    sys.stdin.read()  # node 0 has the store, which the others need until they have printed their results
