"""``python -m zeta_core.system.model_files PATH NAME``: check an archive, and print its fault.

The exit code is 0 if the archive is valid, and also if its fault was printed. The process limits its own memory, and
restricts itself to the archive and the libraries where the machine supports it.
"""

import resource
import sys
from contextlib import suppress
from pathlib import Path

from zeta_core.contract.wire.sandbox import SandboxFile
from zeta_core.system.model_files import InvalidModelFiles, check_archive
from zeta_core.system.sandbox import SandboxUnavailable, restrict

MAX_MEMORY_BYTES = 2 << 30  # several times the need of the largest file that `json_files` reads


def main(path: str, name: str) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    libraries = ("/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]))
    with suppress(SandboxUnavailable):
        restrict(SandboxFile(readable=[path, *libraries], max_tasks=1))
    try:
        check_archive(Path(path), name)
    except InvalidModelFiles as error:
        print(error.message)
    except MemoryError:
        print(f"Checking {name} takes more than {MAX_MEMORY_BYTES} bytes of memory; it does not look like a model.")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
