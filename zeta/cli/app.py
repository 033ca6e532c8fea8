"""The Typer application, and the options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from zeta.cli.modules import MODULES

if TYPE_CHECKING:
    from zeta.cli.completion import Completed

JOBS = "Jobs"
ARTIFACTS = "Checkpoints and files"
SERVICE = "The service"

MAX_SUMMARY = 200  # characters of the first sentence about a command, which `zeta --help` breaks into lines


class Commands(TyperGroup):
    """The commands, in sections. An invalid value of an option or argument is reported like any other error."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the section of each group of commands in `zeta --help`, in the order of `MODULES`."""
        order = [name for names in MODULES.values() for name in names]
        shown = {name: self.commands[name] for name in order if name in self.commands}
        for title in (JOBS, ARTIFACTS, SERVICE):
            rows = [
                (name, command.get_short_help_str(MAX_SUMMARY))
                for name, command in shown.items()
                if getattr(command, "rich_help_panel", None) == title
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if (sentence := _invalid_value(error)) is None:
                raise
            from zeta_core.contract.errors import InvalidRequest

            raise InvalidRequest(sentence, code="invalid_usage", param=_parameter_name(error)) from error


def _invalid_value(error: typer.BadParameter) -> str | None:
    """The parameter, its value and what it must be; ``None`` if the value is missing or typer has its own sentence."""
    from pydantic import ValidationError

    from zeta_core.contract.spec.validation import shown

    if not isinstance(error.__cause__, ValidationError):
        return None
    fault = error.__cause__.errors()[0]
    limits = fault.get("ctx", {})
    requirement = {
        "greater_than_equal": f"at least {limits.get('ge')}",
        "less_than_equal": f"at most {limits.get('le')}",
        "int_parsing_size": "a smaller number",
        "float_parsing": "a number",
    }.get(fault["type"], "a whole number" if fault["type"].startswith("int") else None)
    if requirement is None:
        return f"{_parameter_name(error)}: {fault['msg'].removeprefix('Value error, ').removesuffix('.')}."
    return f"{_parameter_name(error)} is {shown(fault['input'])}; it must be {requirement}."


def _parameter_name(error: typer.BadParameter) -> str:
    """The longest name of the option, such as ``--limit``, or the name of the argument."""
    assert error.param is not None
    return error.param.opts[-1]


app = typer.Typer(
    name="zeta",
    cls=Commands,
    help="Train causal language models on your own machines: submit a job, follow it, download the checkpoint.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def completing(kind: Completed) -> Callable[[str], list[tuple[str, str]]]:
    """The shell completion of an argument that names an object of this kind."""

    def candidates(incomplete: str) -> list[tuple[str, str]]:
        from zeta.cli.completion import complete

        return complete(kind, incomplete)

    return candidates


JobId = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        help="A job id, the beginning of one, or @last for the newest job.",
        autocompletion=completing("job"),
    ),
]


def print_version(value: bool) -> None:
    if value:
        from zeta_core.system.distribution import version

        typer.echo(f"zeta {version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Define the options that come before the command."""
