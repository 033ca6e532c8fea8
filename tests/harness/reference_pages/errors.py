"""docs/reference/errors.md: every error code with its message, which names the cause and the fix.

The codes and messages are read from the source: from the calls that pass ``code=`` and from the error classes. The
parts of a message that depend on the request appear as `…`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from server.http.error_responses import STATUS_OF_TYPE
from tests.harness.reference_pages.markdown import cell, generated, table

ROOT = Path(__file__).parents[3]
PACKAGES = ("zeta_core", "server", "worker", "zeta")
WORD = re.compile(r"[A-Za-z]{2,}")
MIN_WORDS = 4  # a message with fewer words consists of values only, and explains nothing here
HEAD = """\
# Errors

Every failed request returns one JSON object, `{"error": {...}}`. Its fields are `message`, `type`, `param`, `code`
and `details`. `code` is stable, so a program can depend on it. `message` is one sentence with the problem, the value
and the fix. `details` lists every invalid field with `param`, `message`, `code` and, where one is known,
`suggestion`. The `zeta` command reports errors in the same form, with an [exit status](../commands.md#exit-status).
Errors under `/openai/v1` have the [format of OpenAI](../openai.md).

[Events, reasons and states](events.md) lists why a job failed, and why one waits.
"""
CODES = """\
## Codes

The messages are those of the source code; `…` stands for a value. A code may have several messages.
"""


def errors_page() -> str:
    statuses = [(f"`{name}`", str(status), _retry(status)) for name, status in STATUS_OF_TYPE.items()]
    codes = [(f"`{code}`", "<br>".join(cell(text) for text in messages)) for code, messages in sorted(_codes().items())]
    return "\n".join(
        [
            HEAD,
            generated("the messages in zeta_core, server, worker and zeta"),
            "## Types\n",
            table(("type", "HTTP status", "what to do"), statuses),
            CODES,
            table(("code", "cause and fix"), codes),
        ]
    )


def _retry(status: int) -> str:
    if status in (429, 503):
        return "Repeat the request after the seconds in `Retry-After`."
    if status in (408, 500):
        return "Repeat the request; if it fails again, see the log of the server."
    return "Correct the request as described in the message."


def _codes() -> dict[str, list[str]]:
    """The messages of each code, in the order of the source."""
    codes: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                for code, message in _errors_of(node):
                    messages = codes.setdefault(code, [])
                    if len(WORD.findall(message)) >= MIN_WORDS and message not in messages:
                        messages.append(message)
    return {code: messages for code, messages in codes.items() if messages}


def _errors_of(node: ast.AST) -> Iterator[tuple[str, str]]:
    """The code and message of a call such as ``Conflict("...", code="job_ended")`` or of an error class."""
    if isinstance(node, ast.Call):
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        message = keywords.get("message") or (node.args[0] if node.args else None)
        code = keywords.get("code")
        if isinstance(code, ast.Constant) and isinstance(code.value, str) and message is not None:
            yield code.value, _template(message)
    elif isinstance(node, ast.ClassDef):
        for statement in node.body:
            match statement:
                case ast.Assign(targets=[ast.Name(id="code")], value=ast.Constant(value=str(code))):
                    yield code, (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")
                case _:
                    pass


def _template(message: ast.expr) -> str:
    """A message with ``…`` for each value; empty if the source contains no sentence."""
    if isinstance(message, ast.Constant) and isinstance(message.value, str):
        return message.value
    if isinstance(message, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in message.values]
        return "".join(parts)
    if isinstance(message, ast.BinOp) and isinstance(message.op, ast.Add):
        return _template(message.left) + _template(message.right)
    return ""
