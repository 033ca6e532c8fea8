"""``python -m zeta_core.system.model_files PATH NAME``: check an archive; what is wrong with it goes to stdout.

The exit code is 0 where the archive is fine or the sentence was printed. The process limits its own memory, so that a
check that needs more ends by itself.
"""

import resource
import sys
from pathlib import Path

from zeta_core.system.model_files import InvalidModelFiles, check_archive

MAX_MEMORY_BYTES = 2 << 30  # several times what the largest file that `json_files` reads takes


def main(path: str, name: str) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    try:
        check_archive(Path(path), name)
    except InvalidModelFiles as error:
        print(error.message)
    except MemoryError:
        print(f"{name} takes more memory to check than {MAX_MEMORY_BYTES} bytes; it does not look like a model.")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
