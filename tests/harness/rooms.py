"""The rooms of the code, what each may import, and the walk that finds what it does import.

The table is the one of ARCHITECTURE.md. What a room imports of others is an allow-list: a new name in it is a decision.
``never`` repeats what the lists exclude anyway where the table says so in words, because there the rule also holds for
what an import brings along (see `tests/test_imports.py`).
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

OURS = frozenset({"zeta", "zeta_core", "server", "worker", "migrations", "tests", "benchmarks"})


@dataclass(frozen=True)
class Room:
    """One room: a package, without those of its sub-packages that are rooms themselves."""

    package: str  # dotted
    ours: frozenset[str]  # our modules it may import besides its own, with everything below them
    theirs: frozenset[str]  # top-level third-party packages it may import
    never: frozenset[str]  # what must not even be loaded when the room is imported; of our own: outside `ours`
    exceptions: frozenset[tuple[str, str]] = frozenset()  # (file below the root, our module that it alone may import)


ROOMS = (
    Room(
        package="zeta_core.contract",
        ours=frozenset(),
        theirs=frozenset({"pydantic", "pydantic_core"}),
        never=frozenset({"torch", "transformers", "redis", "sqlalchemy", "celery", "fastapi"}),
    ),
    Room(
        package="zeta_core.system",
        ours=frozenset({"zeta_core.contract"}),
        theirs=frozenset({"pydantic"}),
        never=frozenset({"torch", "transformers", "redis", "sqlalchemy", "celery", "fastapi"}),
    ),
    Room(
        package="zeta_core",
        ours=frozenset({"zeta_core.contract", "zeta_core.system"}),
        theirs=frozenset(
            {"torch", "accelerate", "datasets", "transformers", "deepspeed", "peft", "safetensors", "numpy", "pyarrow"}
            | {"pydantic", "huggingface_hub", "filelock"}
            | {"mlflow"}  # where a run reports to it; to the other trackers accelerate speaks
            | {"bitsandbytes"}  # where a base is held in 4 bits
            | {"gguf"}  # the header of a GGUF file
        ),
        never=frozenset({"redis", "sqlalchemy", "celery", "fastapi", "server", "worker", "zeta"}),
    ),
    Room(
        package="server",
        ours=frozenset({"zeta_core.contract", "zeta_core.system"}),
        theirs=frozenset({"fastapi", "starlette", "uvicorn", "sqlalchemy", "redis", "celery", "kombu"})
        | {"pydantic", "pydantic_core", "python_multipart", "prometheus_client"},
        never=frozenset({"torch", "transformers", "worker"}),
    ),
    Room(
        package="worker",
        ours=frozenset({"zeta_core.contract", "zeta_core.system"}),
        theirs=frozenset({"celery", "kombu", "redis", "pydantic", "psutil", "pynvml"}),
        never=frozenset({"torch", "transformers", "sqlalchemy", "server"}),
    ),
    Room(
        package="zeta",
        ours=frozenset({"zeta_core.contract", "zeta_core.system"}),
        theirs=frozenset({"httpx", "typer", "rich", "ruamel", "pydantic"}),
        # The bare distribution is this room with its client's and command's packages, and nothing else.
        never=frozenset({"torch", "transformers", "server", "worker", "fastapi", "sqlalchemy", "celery", "redis"}),
        exceptions=frozenset({("zeta/trainer.py", "zeta_core")}),
    ),
    Room(
        package="migrations",
        ours=frozenset({"server.database.tables", "server.settings", "zeta_core.contract", "zeta_core.system"}),
        theirs=frozenset({"alembic", "sqlalchemy"}),
        never=frozenset({"torch", "transformers", "celery", "worker", "zeta"}),
        # How PostgreSQL is connected to, and the sentences about a database that cannot be opened.
        exceptions=frozenset(
            {
                ("migrations/upgrade.py", "server.database.connections"),
                ("migrations/upgrade.py", "server.database.schema"),
            }
        ),
    ),
)

# Inside a room: parts of one floor do not know each other, and each knows those of the floors below it.
FLOORS = {
    "zeta_core": (
        frozenset({"failures"}),
        frozenset({"environment", "checkpoint", "optim"}),
        frozenset({"plan", "report"}),
        frozenset({"data", "parallel"}),
        frozenset({"model", "objective"}),
        frozenset({"memory"}),
        frozenset({"dry_run", "train"}),
        frozenset({"advice"}),
        frozenset({"run"}),
        frozenset({"process"}),
        frozenset({"__main__"}),
    ),
    "server": (
        frozenset({"settings"}),
        frozenset({"artifacts", "artifact_ownership", "database", "http"}),
        frozenset({"auth", "uploads", "engine"}),
        frozenset({"service"}),
        frozenset({"files", "jobs", "workers", "metrics"}),
        frozenset({"submitting"}),
        frozenset({"estimates"}),
        frozenset({"routes"}),
        frozenset({"app"}),
        frozenset({"__main__"}),
    ),
    "worker": (
        frozenset({"settings", "outage"}),
        frozenset({"guard"}),
        frozenset({"machine", "artifacts"}),
        frozenset({"messaging", "training"}),
        frozenset({"checks", "attempt"}),
        frozenset({"supervise"}),
        frozenset({"app"}),
        frozenset({"__main__"}),
    ),
}


@dataclass(frozen=True)
class Import:
    """One import: where it stands and the dotted names that it may load (``from a import b`` may load ``a.b``)."""

    file: Path
    line: int
    module: str  # what is surely loaded
    names: tuple[str, ...] = ()


def room_files(root: Path, room: Room) -> list[Path]:
    """The room's Python files, sorted. Raises `AssertionError` where the room is missing or empty."""
    directory = root.joinpath(*room.package.split("."))
    inner = [
        root.joinpath(*other.package.split(".")) for other in ROOMS if other.package.startswith(f"{room.package}.")
    ]
    files = sorted(
        file for file in directory.rglob("*.py") if not any(file.is_relative_to(directory) for directory in inner)
    )
    assert any(_says_something(file) for file in files), f"the room {room.package} is missing or empty: {directory}"
    return files


def imports_of(file: Path, root: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands, and every ``import_module``/``__import__`` of a literal name."""
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


def violations(root: Path, rooms: tuple[Room, ...] = ROOMS) -> list[str]:
    """Every import against the table, as ``file:line: sentence``; empty where all keep to it."""
    return [
        f"{found.file.relative_to(root)}:{found.line}: {broken}"
        for room in rooms
        for file in room_files(root, room)
        for found in imports_of(file, root)
        if (broken := _broken_rule(found, room, root)) is not None
    ]


def upward_imports(root: Path, package: str) -> list[str]:
    """Every import of ``package`` that does not point down its `FLOORS`, and every part that stands on none of them."""
    floors = FLOORS[package]
    floor_of = {part: number for number, parts in enumerate(floors) for part in parts}
    (room,) = (room for room in ROOMS if room.package == package)
    found: list[str] = []
    for file in room_files(root, room):
        part = file.relative_to(root / package).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        if part not in floor_of:
            found.append(f"{package}.{part} stands on no floor.")
            continue
        for entry in imports_of(file, root):
            for module in [f"{entry.module}.{name}" for name in entry.names] or [entry.module]:
                names = module.split(".")
                other = names[1] if names[0] == package and len(names) > 1 else part
                if other not in {part, "contract", "system"} and floor_of.get(other, len(floors)) >= floor_of[part]:
                    found.append(
                        f"{file.relative_to(root)}:{entry.line}: {part} imports {other}, which is not below it."
                    )
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


def _broken_rule(found: Import, room: Room, root: Path) -> str | None:
    top = found.module.partition(".")[0]
    if top not in OURS:
        if top in sys.stdlib_module_names or top in room.theirs:
            return None
        return f"{room.package} imports {found.module}; of others' packages it knows only {_listed(room.theirs)}."
    file = found.file.relative_to(root).as_posix()
    inner = tuple(other.package for other in ROOMS if other.package.startswith(f"{room.package}."))
    for module in [f"{found.module}.{name}" for name in found.names] or [found.module]:
        own = _is_below(module, room.package) and not any(_is_below(module, other) for other in inner)
        known = any(_is_below(module, allowed) for allowed in room.ours)
        excepted = any(file == only and _is_below(module, allowed) for only, allowed in room.exceptions)
        if not (own or known or excepted):
            return f"{room.package} imports {module}; of our own rooms it knows only {_listed(room.ours)}."
    return None


def _is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _says_something(file: Path) -> bool:
    """Whether a file holds more than a docstring."""
    statements = ast.parse(file.read_text(), filename=str(file)).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in statements)
