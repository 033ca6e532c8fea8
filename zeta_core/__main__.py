"""``python -m zeta_core RUN_DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

from zeta_core.launch import main

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m zeta_core RUN_DIR")
    sys.exit(main(Path(sys.argv[1]).absolute()))
