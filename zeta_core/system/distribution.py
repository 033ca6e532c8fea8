"""The name of the Python distribution, and its installed version."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "zeta-train"


def version() -> str:
    """The installed version."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0+checkout"  # run from a checkout that is not installed
