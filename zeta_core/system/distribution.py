"""The name of the Python distribution, and the installed versions of it and of the libraries that train."""

from __future__ import annotations

from importlib import metadata
from platform import python_version

DISTRIBUTION = "zeta-train"
# The libraries that determine the results of a training.
LIBRARIES = (
    *("accelerate", "bitsandbytes", "datasets", "deepspeed", "numpy", "peft", "pyarrow", "safetensors", "tokenizers"),
    *("torch", "transformers"),
)


def version() -> str:
    """The installed version."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0+checkout"  # run from a checkout that is not installed


def installed_versions() -> dict[str, str]:
    """The versions of Python, this distribution and the installed `LIBRARIES`."""
    versions = {"python": python_version(), DISTRIBUTION: version()}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue  # it is optional
    return versions
