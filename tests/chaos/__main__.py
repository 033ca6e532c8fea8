"""``python -m tests.chaos --seed N --jobs 100``: the fault suite; exits with status 1 if a promise was broken."""

import argparse
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.chaos.databases import FaultyDatabase, PostgresDatabase, SqliteDatabase
from tests.chaos.suite import FaultSuite
from tests.harness.children import exit_cleanly_on_sigterm
from tests.harness.postgres import PostgresServer

LIMIT_SECONDS = 3600.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="determines the jobs and the faults")
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--database", choices=("postgresql", "sqlite"), default="postgresql")
    parser.add_argument("--limit-seconds", type=float, default=LIMIT_SECONDS, help="time limit of the fault injection")
    options = parser.parse_args()
    exit_cleanly_on_sigterm()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.chmod(0o755)
    log(f"seed {options.seed}: {options.jobs} jobs on {options.database} in {folder}")
    try:
        with _database(options.database, folder) as database:
            suite = FaultSuite(folder / "fleet", database, seed=options.seed, num_jobs=options.jobs, log=log)
            breaches = suite.run(limit_seconds=options.limit_seconds)
    finally:
        shutil.rmtree(folder)
    print(f"\n{suite.report}\n\nseed {options.seed}, {time.monotonic() - began:.0f} s.")
    for breach in breaches:
        print(f"BROKEN: {breach}")
    return 1 if breaches else 0


def log(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _database(name: str, folder: Path) -> Generator[FaultyDatabase]:
    with ExitStack() as closing:
        if name == "sqlite":
            database: FaultyDatabase = SqliteDatabase(folder / "zeta.db")
        else:
            directory = folder / "postgres"
            directory.mkdir()
            server = PostgresServer(directory)
            closing.callback(server.stop)
            server.start()
            database = PostgresDatabase(server, closing.enter_context(server.fresh_database()))
        closing.callback(database.close)
        yield database


if __name__ == "__main__":
    sys.exit(main())
