"""The commands and programs in the documentation: finding them, and running those of a page in a shell."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_SNIPPET = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^>]+) -->\n\n)?^```(?P<language>sh|python)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Snippet:
    """A block of shell commands or a Python program; ``reason`` states why the tests don't run it."""

    language: str
    text: str
    reason: str | None


def snippets(page: Path) -> list[Snippet]:
    return [Snippet(match["language"], match["text"], match["reason"]) for match in _SNIPPET.finditer(page.read_text())]


def script(pages: Sequence[Path]) -> str:
    """One shell script with all snippets of the pages in their order; it stops at the first command that fails."""
    parts = ["set -euo pipefail"]
    for snippet in [snippet for page in pages for snippet in snippets(page) if snippet.reason is None]:
        program = f"{sys.executable} - <<'SNIPPET'\n{snippet.text}SNIPPET"
        parts.append(snippet.text if snippet.language == "sh" else program)
    return "\n".join(parts)


def run_script(text: str, folder: Path, environment: Mapping[str, str], *, timeout_seconds: float) -> str:
    """Run a script with bash in ``folder``, and return its output. It has no terminal."""
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout
