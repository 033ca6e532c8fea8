"""Ports on the loopback interface."""

import socket


def free_loopback_port() -> int:
    """A TCP port that nothing on 127.0.0.1 listens on at this moment.

    The system hands out ephemeral ports in turn, so another process seldom takes the same one before it is used.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
