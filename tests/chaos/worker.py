"""A real worker process whose trainings begin with the witness of `tests.chaos.training`."""

import sys

from worker.app import main

if __name__ == "__main__":
    sys.exit(main((sys.executable, "-P", "-m", "tests.chaos.training")))
