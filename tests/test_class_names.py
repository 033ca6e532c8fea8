"""No two public classes of the product have the same name, so that a name has one meaning everywhere."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "worker", "zeta_core", "zeta")
# The client does not import the server's classes, and its messages have the same meaning.
SHARED = {"ChatMessage"}


def public_classes(root: Path) -> dict[str, list[str]]:
    """The modules that define each public class at their top level."""
    modules: dict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            for statement in ast.parse(file.read_text()).body:
                if isinstance(statement, ast.ClassDef) and not statement.name.startswith("_"):
                    modules[statement.name].append(str(file.relative_to(root)))
    return modules


def test_public_classes_have_different_names() -> None:
    repeated = {name: files for name, files in public_classes(ROOT).items() if len(files) > 1}
    assert set(repeated) == SHARED, repeated


def test_a_repeated_name_is_found(tmp_path: Path) -> None:
    for package in PACKAGES[:2]:
        (tmp_path / package).mkdir()
        (tmp_path / package / "report.py").write_text("class Report:\n    pass\n\n\nclass _Private:\n    pass\n")
    assert public_classes(tmp_path) == {"Report": ["server/report.py", "worker/report.py"]}
