"""Self-signed certificates for servers on this machine."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    """PEM files of a certificate for ``localhost`` and 127.0.0.1, and of its private key."""

    certificate: Path
    key: Path

    def trust(self) -> ssl.SSLContext:
        """The TLS settings of a client that trusts only this certificate."""
        return ssl.create_default_context(cafile=self.certificate)


def self_signed(folder: Path) -> Certificate:
    """Create a certificate that is valid for one day, with OpenSSL."""
    pair = Certificate(folder / "localhost.pem", folder / "localhost.key")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-days", "1"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-out", str(pair.certificate), "-keyout", str(pair.key)]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)
    return pair
