"""A program on Redis's port that is not Redis, such as a proxy with an error page."""

import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager

HTTP_ERROR = b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\n\r\n<html>"


@contextmanager
def non_redis_server(port: int, response: bytes = HTTP_ERROR) -> Generator[None]:
    """Send ``response`` to every connection to the port on 127.0.0.1, and close it, until the block ends."""
    listener = socket.create_server(("127.0.0.1", port), backlog=50)
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set():
            try:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(1)
                    connection.recv(1000)
                    connection.sendall(response)
            except OSError:
                continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
