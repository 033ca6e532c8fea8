"""The style sheet and scripts of the pages, read once into memory and served with a far-future cache lifetime.

The path contains a digest of all assets, so a new version has new URLs. Only these files can be requested, so no
path from a client reaches the file system.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).with_name("static")
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class Asset:
    content: bytes
    media_type: str


@dataclass(frozen=True)
class Assets:
    """All assets by their path below `FOLDER`, and their common ``digest``."""

    digest: str
    files: dict[str, Asset]


@cache
def load_assets() -> Assets:
    """Read all assets; the licences of the vendored files are not served."""
    paths = sorted(path for path in FOLDER.rglob("*") if path.suffix in _MEDIA_TYPES)
    files = {path.relative_to(FOLDER).as_posix(): Asset(path.read_bytes(), _MEDIA_TYPES[path.suffix]) for path in paths}
    digest = hashlib.sha256()
    for name, asset in files.items():
        digest.update(f"{name}\0{len(asset.content)}\0".encode() + asset.content)
    return Assets(digest.hexdigest()[:12], files)
