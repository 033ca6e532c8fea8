"""Showing answers while they are generated: one as running text, two side by side in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from zeta.chat import Answer, ChatMessage
from zeta.cli.output import print_json, print_text, terminal_size
from zeta.client import Client
from zeta_core.contract.printable import printable

REFRESHES_PER_SECOND = 8
MIN_COLUMN_WIDTH = 30  # in a narrower terminal, answers are shown one after the other


def show_answers(
    client: Client,
    models: Mapping[str, str],
    prompts: Mapping[str, Sequence[ChatMessage]] | str,
    options: dict[str, Any],
    *,
    as_json: bool = False,
) -> list[Answer]:
    """Ask every model at the same time, show the answers, and return them.

    ``models`` maps labels to model names; ``prompts`` is a conversation for each label, or a text for all of them.
    """

    def ask(label: str, on_text: Callable[[str], None]) -> Answer:
        prompt = prompts if isinstance(prompts, str) else prompts[label]
        return client.ask(models[label], prompt, on_text=on_text, **options)

    if len(models) == 1:
        [label] = models
        answer = ask(label, (lambda _: None) if as_json else _print_piece)
        if as_json:
            print_json(answer)
        else:
            print()
        return [answer]
    if as_json or not _has_columns():
        answers = _ask_all(models, {label: lambda _: None for label in models}, ask)
        if as_json:
            print_json({label: answer.model_dump() for label, answer in zip(models, answers, strict=True)})
        else:
            for label, answer in zip(models, answers, strict=True):
                print_text(f"{label}: {answer.text}")
        return answers
    return _show_side_by_side(models, ask)


def _ask_all(
    models: Mapping[str, str],
    on_text: Mapping[str, Callable[[str], None]],
    ask: Callable[[str, Callable[[str], None]], Answer],
) -> list[Answer]:
    executor = ThreadPoolExecutor(len(models))
    try:
        asked = [executor.submit(ask, label, on_text[label]) for label in models]
        return [each.result() for each in asked]
    finally:
        executor.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C, the rest is not needed


def _show_side_by_side(models: Mapping[str, str], ask: Callable[[str, Callable[[str], None]], Answer]) -> list[Answer]:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = dict.fromkeys(models, "")

    def table() -> Table:
        columns = Table(expand=True, box=None, padding=(0, 2, 0, 0))
        for label in models:
            columns.add_column(label, ratio=1, overflow="fold")
        columns.add_row(*(Text(printable(text, keep="\n")) for text in texts.values()))
        return columns

    def collect(label: str) -> Callable[[str], None]:
        def add(piece: str) -> None:
            texts[label] += piece

        return add

    with Live(
        get_renderable=table,
        console=Console(highlight=False, width=terminal_size().columns),
        refresh_per_second=REFRESHES_PER_SECOND,
        vertical_overflow="visible",
    ):
        return _ask_all(models, {label: collect(label) for label in models}, ask)


def _has_columns() -> bool:
    return sys.stdout.isatty() and terminal_size().columns >= 2 * MIN_COLUMN_WIDTH


def _print_piece(piece: str) -> None:
    print(printable(piece, keep="\n"), end="", flush=True)
