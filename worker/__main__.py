"""``python -m worker`` (``zeta worker``): runs a worker until SIGTERM or SIGINT."""

import sys

from worker.app import main

if __name__ == "__main__":
    sys.exit(main())
