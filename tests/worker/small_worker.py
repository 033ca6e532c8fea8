"""A real worker process whose runs are `small_training`. The argument, if any, is `GuardLimits.hang_seconds`."""

import sys
from pathlib import Path

from worker.app import main
from worker.threads import GuardLimits

if __name__ == "__main__":
    limits = GuardLimits(tick_seconds=0.1, hang_seconds=float(sys.argv[1])) if len(sys.argv) > 1 else GuardLimits()
    sys.exit(main((sys.executable, str(Path(__file__).with_name("small_training.py"))), limits))
