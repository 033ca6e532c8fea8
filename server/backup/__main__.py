"""``python -m server.backup`` (``zeta backup`` and ``zeta restore``).

The exit status is 0 after a complete backup or restore, 1 if files were missing or damaged, 2 for invalid settings or
folders, 4 if the database or the artifact store does not respond, and 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from server.backup.create import BackupReport, create_backup
from server.backup.restore import RestoreReport, restore_backup
from server.settings import StorageSettings
from zeta_core.contract.errors import Unavailable, ZetaError
from zeta_core.contract.printable import printable


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["create", "restore"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        report = _run(options.command, options.directory.absolute())
    except ZetaError as error:
        print(error.body().model_dump_json() if options.json else f"Error: {printable(error.message)}", file=sys.stderr)
        return 4 if isinstance(error, Unavailable) else 2
    except KeyboardInterrupt:
        print("Interrupted; repeat the command to continue.", file=sys.stderr)
        return 130
    if options.json:
        print(report.model_dump_json())
    else:
        _print(report)
    return 1 if report.problems else 0


def _run(command: str, directory: Path) -> BackupReport | RestoreReport:
    environment = dict(os.environ)  # noqa: TID251 - the entry point reads it once
    settings = StorageSettings.from_environment(environment)
    try:
        if command == "create":
            return create_backup(settings, directory, environment)
        return restore_backup(settings, directory, environment)
    except OSError as error:
        reason = error.strerror or str(error)
        what = "backup" if command == "create" else "restore"
        raise Unavailable(
            f"The {what} failed: {reason} ({error.filename or directory}); repeat the command to continue."
        ) from error


def _print(report: BackupReport | RestoreReport) -> None:
    for key in report.problems:
        print(f"missing or damaged  {printable(key)}")
    checkpoints, files = _count(report.checkpoints, "checkpoint"), _count(report.files, "other file")
    content = f"{_count(report.jobs, 'job')} with {checkpoints} and {files}"
    if isinstance(report, BackupReport):
        sizes = f"{_count(report.bytes, 'byte')}, {report.new_bytes} of them copied now"
        print(f"Backed up the database and {content} to {report.directory} ({sizes}).")
    else:
        print(f"Restored the database and {content} to {report.database} and {report.store}.")
    if report.problems:
        print("The database names files that are missing or damaged; they are listed above.")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
