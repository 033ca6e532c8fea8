"""A real worker process that starts `tests.chaos.training` for each attempt."""

import sys

from worker.app import main

if __name__ == "__main__":
    sys.exit(main((sys.executable, "-P", "-m", "tests.chaos.training")))
