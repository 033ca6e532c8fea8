"""A real worker process whose trainings are `small_training`."""

import sys
from pathlib import Path

from worker.app import main

if __name__ == "__main__":
    sys.exit(main((sys.executable, str(Path(__file__).with_name("small_training.py")))))
