"""Self-signed certificates for servers on this machine."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    """PEM files of a certificate and of its private key."""

    certificate: Path
    key: Path

    def trust(self) -> ssl.SSLContext:
        """The TLS settings of a client that trusts only this certificate."""
        return ssl.create_default_context(cafile=self.certificate)


def self_signed(folder: Path, names: str = "DNS:localhost,IP:127.0.0.1") -> Certificate:
    """Create a certificate for these names that is valid for one day, with OpenSSL."""
    pair = Certificate(folder / "server.pem", folder / "server.key")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-days", "1"]
    files = ["-out", str(pair.certificate), "-keyout", str(pair.key)]
    subprocess.run([*command, "-addext", f"subjectAltName={names}", *files], check=True, capture_output=True)
    return pair
