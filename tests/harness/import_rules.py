"""The import rules of every package, and the search for imports that break them.

The rules are those of ARCHITECTURE.md. The imports of a package are an allow-list, so a new entry is a deliberate
decision. ``forbidden`` lists modules that must not even be loaded indirectly when the package is imported
(`tests/test_imports.py`).
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PROJECT = frozenset({"zeta", "zeta_core", "server", "worker", "migrations", "tests", "benchmarks"})


@dataclass(frozen=True)
class Package:
    """The import rules of one package, except for sub-packages that have separate rules."""

    name: str  # dotted
    internal: frozenset[str]  # modules of this project that it may import besides its own, with their submodules
    third_party: frozenset[str]  # top-level third-party packages that it may import
    forbidden: frozenset[str]  # modules that importing the package must not load, directly or indirectly
    exceptions: frozenset[tuple[str, str]] = frozenset()  # (file, module of this project that only it may import)


PACKAGES = (
    Package(
        name="zeta_core.contract",
        internal=frozenset(),
        third_party=frozenset({"pydantic", "pydantic_core", "typing_extensions"}),
        forbidden=frozenset({"torch", "transformers", "redis", "sqlalchemy", "celery", "fastapi"}),
    ),
    Package(
        name="zeta_core.system",
        internal=frozenset({"zeta_core.contract"}),
        third_party=frozenset({"pydantic"})
        | {"boto3", "botocore", "urllib3"},  # optional: imported only for an artifact store in a bucket
        forbidden=frozenset({"torch", "transformers", "redis", "sqlalchemy", "celery", "fastapi"}),
    ),
    Package(
        name="zeta_core",
        internal=frozenset({"zeta_core.contract", "zeta_core.system"}),
        third_party=frozenset(
            {"torch", "accelerate", "datasets", "transformers", "deepspeed", "peft", "safetensors", "numpy", "pyarrow"}
            | {"pydantic", "huggingface_hub", "filelock"}
            | {"mlflow"}  # if a run reports to it; accelerate imports the other trackers
            | {"bitsandbytes"}  # for a base model in 4 bits
            | {"gguf"}  # the header of a GGUF file
            | {"psutil"}  # the ranks of a node and its network interfaces
            | {"xllamacpp"}  # only a program for another environment imports it
        ),
        forbidden=frozenset({"redis", "sqlalchemy", "celery", "fastapi", "server", "worker", "zeta"})
        | {"peft", "bitsandbytes", "torch._dynamo", "datasets", "pyarrow"},  # slow to import, and not for every run
    ),
    Package(
        name="server",
        internal=frozenset({"zeta_core.contract", "zeta_core.system"}),
        third_party=frozenset({"fastapi", "starlette", "uvicorn", "sqlalchemy", "redis", "celery", "kombu"})
        | {"cryptography"}  # signing receipts
        | {"httpx"}  # for requests to an engine of the operator
        | {"psutil"}  # the addresses of this machine
        | {"pydantic", "pydantic_core", "python_multipart", "prometheus_client"}
        | {"jinja2", "markupsafe"}  # the web pages
        | {"ruamel"}  # specs as YAML in the web pages
        | {"opentelemetry"},  # optional: traces, if an exporter is configured
        forbidden=frozenset({"torch", "transformers", "worker"}),
    ),
    Package(
        name="worker",
        internal=frozenset({"zeta_core.contract", "zeta_core.system"}),
        third_party=frozenset({"celery", "kombu", "redis", "pydantic", "psutil", "pynvml"}),
        forbidden=frozenset({"torch", "transformers", "sqlalchemy", "server"}),
    ),
    Package(
        name="zeta",
        internal=frozenset({"zeta_core.contract", "zeta_core.system"}),
        third_party=frozenset({"httpx", "httpx_sse", "plotext", "pydantic", "rich", "ruamel", "typer"})
        | {"cryptography"}  # verifying receipts
        | {"pandas"},  # optional: `job.metrics()` returns a DataFrame if it is installed
        # A bare install contains only the third-party packages above.
        forbidden=frozenset({"torch", "transformers", "server", "worker", "fastapi", "sqlalchemy", "celery", "redis"}),
        exceptions=frozenset({("zeta/trainer.py", "zeta_core")}),
    ),
    Package(
        name="migrations",
        internal=frozenset(
            {
                "server.database.all_tables",
                "server.settings",
                "zeta_core.contract",
                "zeta_core.system",
            }
        ),
        third_party=frozenset({"alembic", "sqlalchemy"}),
        forbidden=frozenset({"torch", "transformers", "celery", "worker", "zeta"}),
        # Connecting to PostgreSQL, and the messages about a database that cannot be opened.
        exceptions=frozenset(
            {
                ("migrations/upgrade.py", "server.database.connections"),
                ("migrations/upgrade.py", "server.database.schema"),
            }
        ),
    ),
)

# Layers inside a package, lowest first. A module imports only from lower layers, and not from its own layer.
LAYERS = {
    "zeta_core": (
        frozenset({"failures"}),
        frozenset({"environment", "checkpoint", "optim"}),
        frozenset({"plan", "report"}),
        frozenset({"data", "parallel"}),
        frozenset({"model", "objective"}),
        frozenset({"memory"}),
        frozenset({"ask", "dry_run", "export", "serve", "train"}),
        frozenset({"advice", "batches"}),
        frozenset({"run"}),
        frozenset({"evaluations"}),
        frozenset({"process"}),
        frozenset({"__main__"}),
    ),
    "server": (
        frozenset({"settings", "tracing"}),
        frozenset({"artifacts", "artifact_ownership", "database", "http"}),
        frozenset({"auth", "uploads", "engine", "notifications", "receipt_signing", "store_comparison", "backup"}),
        frozenset({"sessions"}),
        frozenset({"service"}),
        frozenset({"audit", "files", "jobs", "keys", "metrics", "projects", "worker_secrets", "workers"}),
        frozenset({"lineage", "receipts", "webhooks"}),
        frozenset({"submitting"}),
        frozenset({"estimates"}),
        frozenset({"openai"}),
        frozenset({"evaluations"}),
        frozenset({"routes"}),
        frozenset({"web"}),
        frozenset({"app"}),
        frozenset({"__main__", "store_check"}),
    ),
    "worker": (
        frozenset({"settings", "threads"}),
        frozenset({"machine", "artifacts"}),
        frozenset({"messaging", "run"}),
        frozenset({"checks", "attempt", "serving"}),
        frozenset({"supervisor"}),
        frozenset({"app"}),
        frozenset({"__main__"}),
    ),
}


@dataclass(frozen=True)
class Import:
    """One import statement and the dotted names that it may load (``from a import b`` may load ``a.b``)."""

    file: Path
    line: int
    module: str  # always loaded
    names: tuple[str, ...] = ()


def source_files(root: Path, package: Package) -> list[Path]:
    """The package's Python files, sorted. Raises `AssertionError` if the package is missing or empty."""
    directory = root.joinpath(*package.name.split("."))
    nested = [root.joinpath(*other.name.split(".")) for other in PACKAGES if other.name.startswith(f"{package.name}.")]
    files = sorted(
        file for file in directory.rglob("*.py") if not any(file.is_relative_to(directory) for directory in nested)
    )
    assert any(_has_code(file) for file in files), f"the package {package.name} is missing or empty: {directory}"
    return files


def imports_of(file: Path, root: Path) -> Iterator[Import]:
    """Every import of a file at any depth, and every ``import_module`` or ``__import__`` of a literal name."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(), filename=str(file))):
        match node:
            case ast.Import(names=aliases):
                for alias in aliases:
                    yield Import(file, node.lineno, alias.name)
            case ast.ImportFrom(module=module, names=aliases, level=level):
                parts = (
                    [*package[: len(package) - level + 1], *([module] if module else [])] if level else [module or ""]
                )
                yield Import(file, node.lineno, ".".join(parts), tuple(alias.name for alias in aliases))
            case ast.Call(
                func=ast.Name(id=function) | ast.Attribute(attr=function), args=[ast.Constant(value=str(name)), *_]
            ):
                if function in {"import_module", "__import__"}:
                    yield Import(file, node.lineno, name)
            case _:
                pass


def violations(root: Path, packages: tuple[Package, ...] = PACKAGES) -> list[str]:
    """Every import that breaks a rule, as ``file:line: sentence``."""
    return [
        f"{found.file.relative_to(root)}:{found.line}: {broken}"
        for package in packages
        for file in source_files(root, package)
        for found in imports_of(file, root)
        if (broken := _broken_rule(found, package, root)) is not None
    ]


def upward_imports(root: Path, name: str) -> list[str]:
    """Every import inside a package that does not point to a lower layer, and every module without a layer."""
    layers = LAYERS[name]
    layer_of = {module: number for number, modules in enumerate(layers) for module in modules}
    (package,) = (package for package in PACKAGES if package.name == name)
    found: list[str] = []
    for file in source_files(root, package):
        module = file.relative_to(root / name).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        if module not in layer_of:
            found.append(f"{name}.{module} has no layer.")
            continue
        for entry in imports_of(file, root):
            for imported in [f"{entry.module}.{member}" for member in entry.names] or [entry.module]:
                parts = imported.split(".")
                other = parts[1] if parts[0] == name and len(parts) > 1 else module
                exempt = other in {module, "contract", "system"}
                if not exempt and layer_of.get(other, len(layers)) >= layer_of[module]:
                    location = f"{file.relative_to(root)}:{entry.line}"
                    found.append(f"{location}: {module} imports {other}, which is not in a lower layer.")
    return found


def import_cycle(root: Path, package: str) -> list[str]:
    """The modules of one import cycle in ``package``, the first one repeated at the end; empty if there is none."""
    files = {".".join(file.relative_to(root).with_suffix("").parts): file for file in (root / package).rglob("*.py")}
    graph = {
        module: {
            name
            for found in imports_of(file, root)
            for name in (found.module, *(f"{found.module}.{name}" for name in found.names))
            if name in files
        }
        for module, file in files.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _broken_rule(found: Import, package: Package, root: Path) -> str | None:
    top = found.module.partition(".")[0]
    if top not in PROJECT:
        if top in sys.stdlib_module_names or top in package.third_party:
            return None
        return f"{package.name} imports {found.module}; allowed third-party packages: {_listed(package.third_party)}."
    file = found.file.relative_to(root).as_posix()
    nested = tuple(other.name for other in PACKAGES if other.name.startswith(f"{package.name}."))
    for module in [f"{found.module}.{name}" for name in found.names] or [found.module]:
        own = _is_below(module, package.name) and not any(_is_below(module, other) for other in nested)
        allowed = any(_is_below(module, other) for other in package.internal)
        excepted = any(file == only and _is_below(module, other) for only, other in package.exceptions)
        if not (own or allowed or excepted):
            return f"{package.name} imports {module}; allowed packages of this project: {_listed(package.internal)}."
    return None


def _is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _has_code(file: Path) -> bool:
    """Whether a file contains more than a docstring."""
    statements = ast.parse(file.read_text(), filename=str(file)).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in statements)
