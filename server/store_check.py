"""``python -m server.store_check`` (``zeta artifacts check``): compares the artifact store with the database.

The exit status is 0 if they match, 1 if they differ, 2 for invalid settings, and 4 if one of them does not respond.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys

from server.artifact_ownership import require_owner
from server.database.connections import Database
from server.database.schema import require_schema
from server.database.service_identity import read_service_id
from server.settings import StorageSettings
from server.store_comparison import StoreComparison, StoreDifference, compare
from zeta_core.contract.errors import InvalidSettings, Unavailable, ZetaError
from zeta_core.contract.printable import printable
from zeta_core.system.artifact_store import open_store


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hash", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        settings = StorageSettings.from_environment(os.environ)  # noqa: TID251 - the entry point reads it once
        comparison = asyncio.run(check(settings, verify_content=options.hash))
    except ZetaError as error:
        print(error.body().model_dump_json() if options.json else f"Error: {printable(error.message)}", file=sys.stderr)
        return 2 if isinstance(error, InvalidSettings) else 4
    if options.json:
        print(json.dumps(comparison.model_dump(mode="json")))
    else:
        _print(comparison)
    return 1 if comparison.differences else 0


async def check(settings: StorageSettings, *, verify_content: bool) -> StoreComparison:
    """Compare the store of these settings with their database. Raises `InvalidSettings` and `Unavailable`."""
    database = Database(settings.database)
    try:
        await require_schema(database)
        store = open_store(settings)
        try:
            await asyncio.to_thread(store.check_access)
            await asyncio.to_thread(require_owner, store, await read_service_id(database))
            return await compare(database, store, verify_content=verify_content)
        except OSError as error:
            reason = error.strerror or str(error)
            raise Unavailable(f"The artifact store {store} (ZETA_ARTIFACTS_URL) cannot be read: {reason}.") from error
    finally:
        await database.close()


def _print(comparison: StoreComparison) -> None:
    for difference in comparison.differences:
        print(f"{difference.kind.replace('_', ' '):<13}  {printable(difference.key)}{_sizes(difference)}")
    num_files, num_differences = comparison.num_files, len(comparison.differences)
    subject = f"1 file in {comparison.store}" if num_files == 1 else f"{num_files} files in {comparison.store}"
    if num_differences:
        verb = "was" if num_files == 1 else "were"
        differences = f"{num_differences} difference{'s' if num_differences > 1 else ''}"
        result = f"{verb} compared with the database: {differences}"
    else:
        result = "matches the database" if num_files == 1 else "match the database"
    owner = "Its" if num_files == 1 else "Their"
    content = f"{owner} content was {'verified' if comparison.hashed else 'not verified (--hash)'}."
    print(f"{subject} {result}. {content}")


def _sizes(difference: StoreDifference) -> str:
    sizes = {"stored": difference.stored_bytes, "expected": difference.expected_bytes}
    shown = ", ".join(f"{num_bytes} bytes {which}" for which, num_bytes in sizes.items() if num_bytes is not None)
    return f"  ({shown})" if shown else ""


if __name__ == "__main__":
    sys.exit(main())
