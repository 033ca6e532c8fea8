"""Progress bars for downloads and uploads, shown only in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TextIO

from zeta.download import DownloadProgress
from zeta_core.contract.printable import printable


@contextmanager
def download_progress(stream: TextIO) -> Generator[Callable[[DownloadProgress], None] | None]:
    """The progress callback for `Client.download`, or ``None`` without a terminal."""
    with _bar(stream) as update:
        yield None if update is None else lambda now: update(now.file, now.bytes, now.total_bytes)


@contextmanager
def upload_progress(stream: TextIO) -> Generator[Callable[[int, int], None] | None]:
    """The progress callback for `Client.upload`, or ``None`` without a terminal."""
    with _bar(stream) as update:
        yield None if update is None else lambda sent, total: update("uploading", sent, total)


@contextmanager
def _bar(stream: TextIO) -> Generator[Callable[[str, int, int], None] | None]:
    if not stream.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, done, total: bar.update(task, description=printable(name), completed=done, total=total)
