"""The stages of the data pipeline import in one direction."""

from pathlib import Path

import zeta_core.data
from tests.harness.import_rules import imports_of

DIRECTORY = Path(zeta_core.data.__file__).parent
ORDER = ("sandbox", "rows", "sources", "documents", "tokens", "sequences", "row_check", "data_report")


def test_a_stage_imports_only_from_earlier_stages() -> None:
    files = sorted(DIRECTORY.rglob("*.py"))
    upward = [
        f"{file.relative_to(DIRECTORY)}:{found.line}: {name}"
        for file in files
        for found in imports_of(file, DIRECTORY.parent.parent)
        for name in (found.module, *(f"{found.module}.{member}" for member in found.names))
        if (stage := requested_zero_stage(name)) is not None
        and file.parent != DIRECTORY
        and ORDER.index(stage) > ORDER.index(file.relative_to(DIRECTORY).parts[0])
    ]
    assert upward == []


def test_every_module_belongs_to_a_stage() -> None:
    names = {file.relative_to(DIRECTORY).parts[0].removesuffix(".py") for file in DIRECTORY.rglob("*.py")}
    assert names == {"__init__", *ORDER}


def requested_zero_stage(module: str) -> str | None:
    """The stage of a module of `zeta_core.data`, or None for another module."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["zeta_core", "data"] and len(parts) > 2 else None
