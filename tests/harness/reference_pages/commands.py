"""docs/reference/command-line.md: the help text of every command, from the parsers of the `zeta` command."""

from __future__ import annotations

from collections.abc import Iterator

import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from tests.harness.reference_pages.markdown import generated
from zeta.cli.app import app
from zeta.cli.entry_point import add_commands
from zeta.cli.modules import MODULES

HEAD = """\
# The command line

`zeta COMMAND --help` prints these texts. [Job commands by state](../commands.md) describes the effect of each command
in each state of a job, the use in scripts, and the exit statuses.
"""
WIDTH = 100


def commands_page() -> str:
    add_commands()
    parts = [HEAD, generated("zeta/cli")]
    for path in _paths():
        parts += [f"{'##' if len(path) == 1 else '###'} `zeta {' '.join(path)}`\n", f"```text\n{_help(path)}\n```\n"]
    return "\n".join(parts)


def _paths() -> Iterator[tuple[str, ...]]:
    """The words of every command and sub-command, in the order of `zeta --help`."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for name in [name for names in MODULES.values() for name in names]:
        yield (name,)
        if isinstance(below := group.commands[name], TyperGroup):
            yield from ((name, inner) for inner in below.commands)


def _help(path: tuple[str, ...]) -> str:
    result = CliRunner().invoke(app, [*path, "--help"], prog_name="zeta", terminal_width=WIDTH, catch_exceptions=False)
    return result.output.strip()
