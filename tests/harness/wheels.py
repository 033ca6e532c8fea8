"""The location of an installed wheel, without running its code."""

import importlib.util
from pathlib import Path


def package_directory(package: str) -> Path:
    """The directory of an installed top-level package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed; `make setup` installs it.", name=package)
    return Path(spec.origin).parent
