"""A real worker process whose runs are `hostile_training`."""

import sys
from pathlib import Path

from worker.app import main

if __name__ == "__main__":
    sys.exit(main((sys.executable, str(Path(__file__).with_name("hostile_training.py")))))
