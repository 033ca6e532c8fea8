"""Finds calls and imports that could execute what a user has sent, or what other users of the machine have prepared.

The former are unpickling, code of model repositories and evaluation; the latter are fixed names in /tmp, and modules
that are imported from the working directory.

Shells are found by ruff (S602 to S607).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

UNPICKLERS = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"})
BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
# By the end of a call's name: the argument that makes it safe, and its value.
REQUIRED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
FORBIDDEN = frozenset(
    {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "read_pickle", "os.system", "os.popen", "tempfile.mktemp"}
)
# Arguments that no call may have with another value.
FIXED = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True}
SHARED_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # where every user of the machine can create files


def unsafe_calls(path: Path) -> Iterator[str]:
    """Each unsafe call or import in a Python file, as ``line: what``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            yield from (f"{node.lineno}: import {name}" for name in modules if name.partition(".")[0] in UNPICKLERS)
        elif isinstance(node, ast.Call):
            yield from (f"{node.lineno}: {what}" for what in _faults(node))
        elif isinstance(node, ast.Constant) and str(node.value).startswith(tuple(f"{f}/" for f in SHARED_FOLDERS)):
            yield f"{node.lineno}: the fixed name {node.value}"
        elif isinstance(node, ast.Tuple | ast.List):
            words = [element.value for element in node.elts if isinstance(element, ast.Constant)]
            if "-m" in words and "-P" not in words:
                yield f"{node.lineno}: a module imported from the working directory, without -P"


def _faults(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
    if name.endswith("Path") and call.args and "gettempdir" in ast.unparse(call.args[0]):
        yield "a path in the folder of temporary files"
    if name in BUILTINS or any(name == ending or name.endswith(f".{ending}") for ending in FORBIDDEN):
        yield name
    for ending, (argument, value) in REQUIRED.items():
        if name.endswith(ending) and not _is(given.get(argument), value):
            yield f"{name} without {argument}={value}"
    for argument, value in FIXED.items():
        if argument in given and not _is(given[argument], value):
            yield f"{name} with {argument}={ast.unparse(given[argument])}"


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
