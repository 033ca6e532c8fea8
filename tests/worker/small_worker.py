"""A real worker process whose trainings are `small_training`. The argument, if any, is `Limits.hang_seconds`."""

import sys
from pathlib import Path

from worker.app import main
from worker.guard import Limits

if __name__ == "__main__":
    limits = Limits(tick_seconds=0.1, hang_seconds=float(sys.argv[1])) if len(sys.argv) > 1 else Limits()
    sys.exit(main((sys.executable, str(Path(__file__).with_name("small_training.py"))), limits))
