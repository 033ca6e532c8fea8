"""A TCP relay on an address of this machine between a client and a server on the loopback interface. It can be cut.

A cut relay behaves as if packets were dropped: connections stay open, new ones are accepted but get no response, and
data that was sent meanwhile arrives when the relay is restored, as TCP's retransmission would deliver it.

A relay can also close connections on which the server is silent for too long, as nginx (``proxy_read_timeout``, 60 s)
and load balancers do.
"""

import contextlib
import socket
import threading

CHUNK_BYTES = 65_536


class TcpRelay:
    """Relays connections to ``port`` on itself to ``target_port`` until `close`."""

    def __init__(
        self,
        target_port: int,
        *,
        address: str = "127.0.0.1",
        idle_seconds: float | None = None,
        bytes_per_second: float | None = None,
    ) -> None:
        """``address`` is the one on which it listens. ``bytes_per_second`` limits each direction of each connection."""
        self.num_idle_cuts = 0
        self.sent = bytearray()  # by all clients
        self.num_received_bytes = 0  # by all clients
        self._target_port, self._idle_seconds = target_port, idle_seconds
        self._bytes_per_second = bytes_per_second
        self._open = threading.Event()
        self._open.set()
        self._closed = False
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server((address, 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name=f"relay-{self.port}", daemon=True).start()

    def cut(self) -> None:
        self._open.clear()

    def restore(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._closed = True
        self._open.set()
        for endpoint in (self._listener, *list(self._sockets)):
            _hang_up(endpoint)

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        self._open.wait()
        try:
            far = socket.create_connection(("127.0.0.1", self._target_port), timeout=5)
        except OSError:
            _hang_up(near)  # nothing listens there; the client sees a closed connection
            return
        far.settimeout(self._idle_seconds)
        for endpoint in (near, far):
            endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets.add(endpoint)
        threading.Thread(target=self._carry, args=(far, near), daemon=True).start()
        self._carry(near, far, record=self.sent)

    def _carry(self, source: socket.socket, sink: socket.socket, record: bytearray | None = None) -> None:
        """Relay bytes in one direction until either end closes."""
        try:
            while data := source.recv(CHUNK_BYTES):
                self._open.wait()
                if record is None:
                    self.num_received_bytes += len(data)
                else:
                    record += data
                if self._bytes_per_second is not None:
                    threading.Event().wait(len(data) / self._bytes_per_second)
                sink.sendall(data)
        except TimeoutError:
            self.num_idle_cuts += 1
        except OSError:
            pass  # the other direction or the other end closed
        self._open.wait()  # a cut relay does not deliver the end of a connection either
        for endpoint in (source, sink):
            self._sockets.discard(endpoint)
            _hang_up(endpoint)


def _hang_up(endpoint: socket.socket) -> None:
    with contextlib.suppress(OSError):
        endpoint.shutdown(socket.SHUT_RDWR)  # wakes a thread that is blocked on it, unlike `close`
    endpoint.close()
