"""``python -m worker``: what ``zeta worker`` starts."""

import sys

from worker.app import main

if __name__ == "__main__":
    sys.exit(main())
