"""``python -m migrations`` (``zeta migrate``): upgrades ``ZETA_DATABASE_URL`` to the latest revision."""

from __future__ import annotations

import logging
import os
import sys

from migrations.upgrade import upgrade
from server.settings import DatabaseSettings
from zeta_core.contract.errors import ZetaError


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        settings = DatabaseSettings.from_environment(os.environ)  # noqa: TID251 - the entry point reads it once
        upgrade(settings.database)
    except ZetaError as error:
        print(error.message, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
