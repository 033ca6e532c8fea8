"""`zeta data show`: print rows of a dataset as training reads them, on this machine and without a server."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from zeta.cli.app import JOBS, AsJson, app
from zeta.cli.submit import Settings

if TYPE_CHECKING:
    from zeta_core.contract.job.data_preview import ShownDocument, ShownRow, ShownRows

data = typer.Typer(help="Inspect training data.", no_args_is_help=True)
app.add_typer(data, name="data", rich_help_panel=JOBS)

_SEPARATOR = "\u2502"  # between tokens; rare in texts
_LEGEND = (
    f"+ trained on   (blank) context, not trained on   x cut off, beyond seq_len   {_SEPARATOR} between tokens   "
    "<123> a part of a character"
)
_COLOURS = {"+": "\x1b[32m", "x": "\x1b[31m"}
_NO_COLOUR = "\x1b[0m"


@data.command("show")
def show(
    source: Annotated[
        str, typer.Argument(metavar="FILE|SPEC", help="Data as in --data of `zeta submit`, or a job spec (YAML, JSON).")
    ],
    rows: Annotated[int, typer.Option("--rows", min=1, max=1000, help="Number of rows to show.")] = 3,
    row: Annotated[int | None, typer.Option("--row", min=0, help="Show only the row or line with this number.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A Hub id, or a local folder, .gguf or config.json; not a stored checkpoint.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A Hub id or a local folder. Default: the model's tokenizer.")
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Show rows of a dataset token by token.

    Tokens that are trained on or cut off are marked, and unused columns are listed. No server is needed.
    """
    from zeta.cli.output import print_json
    from zeta.data_preview import local_spec, preview_rows

    preview = preview_rows(local_spec(source, model, tokenizer, settings or []), rows, row)
    if as_json:
        print_json(preview)
    else:
        _print(preview, in_colour=sys.stdout.isatty())
    if any(shown.error for shown in preview.data):
        raise typer.Exit(1)


def _print(preview: ShownRows, *, in_colour: bool) -> None:
    from zeta.cli.output import print_text

    print_text(f"tokenizer: {preview.tokenizer}, seq_len: {preview.seq_len}")
    for note in preview.notes:
        print_text(note)
    print(_LEGEND)
    for row in preview.data:
        print()
        _print_row(row, in_colour=in_colour)


def _print_row(row: ShownRow, *, in_colour: bool) -> None:
    from zeta.cli.output import print_text

    if row.error is not None:
        print_text(f"{row.place} is rejected.\n  error: {row.error}")
        return
    shape = f" ({row.shape})" if row.shape else ""
    print_text(f"{row.place}: format {row.format}{shape}")
    for number, document in enumerate(row.documents):
        name = ("chosen", "rejected")[number] if row.format == "preference" else f"document {number + 1}"
        _print_document("" if len(row.documents) == 1 else f"{name}: ", document, in_colour=in_colour)
    if row.unused_columns:
        print_text(f"  columns not used: {', '.join(row.unused_columns)}")
    for note in row.notes:
        print_text(f"  note: {note}")


def _print_document(name: str, document: ShownDocument, *, in_colour: bool) -> None:
    """One line for each run of tokens of the same kind; a run also ends after a line break."""
    from zeta_core.contract.printable import printable

    cut = f", {document.num_truncated:,} cut off" if document.num_truncated else ""
    print(f"  {name}{_tokens(document.num_tokens)}, {document.num_trained:,} trained on{cut}")
    line: list[str] = []
    mark = ""

    def flush() -> None:
        if line:
            text = f"{mark or ' '} {_SEPARATOR.join(line)}"
            colour = _COLOURS.get(mark, "") if in_colour else ""
            print(f"  {colour}{text}{_NO_COLOUR if colour else ''}")
            line.clear()

    for token in document.tokens:
        kind = "x" if token.truncated else "+" if token.trained else " "
        if kind != mark:
            flush()
            mark = kind
        line.append(printable(token.text.replace("\n", "\\n").replace("\t", "\\t")))
        if token.text.endswith("\n"):
            flush()
    flush()
    if hidden := document.num_tokens - len(document.tokens):
        print(f"    ({_tokens(hidden, 'more ')}{', in further sequences' if document.split else ''})")


def _tokens(number: int, more: str = "") -> str:
    return f"1 {more}token" if number == 1 else f"{number:,} {more}tokens"
