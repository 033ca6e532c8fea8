"""A small program that a worker can start, or fork through the real `ForkServer`, without importing torch.

``python forked_program.py RUN_DIR``, or ``python forked_program.py fork-server MARK``. Started or forked, it writes
what it inherited to ``RUN_DIR/facts.json``, and exits when ``RUN_DIR/exit`` contains a status.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from zeta_core.process.fork_server import ForkServer
from zeta_core.process.preloading import CodeFingerprint


def facts() -> dict[str, Any]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    descriptors = {name: _target(name) for name in sorted(os.listdir("/proc/self/fd"), key=int)}
    child = [sys.executable, "-c", "import os, json; print(json.dumps(dict(os.environ)))"]
    return {
        "environment": dict(os.environ),  # noqa: TID251 - a program of its own
        "environment of a child": json.loads(subprocess.run(child, capture_output=True, check=True).stdout),
        "arguments": sys.argv[1:],
        "limits": {
            name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name[:7] == "RLIMIT_"
        },
        "status": {name: status[name].strip() for name in ("Umask", "Threads", "SigBlk", "SigIgn", "SigCgt", "Uid")},
        "cpus": sorted(os.sched_getaffinity(0)),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "out of memory": Path("/proc/self/oom_score_adj").read_text(),
        "leads a session": os.getsid(0) == os.getpid() == os.getpgrp(),
        "folder": os.getcwd(),
        "descriptors": sorted(target for target in descriptors.values() if not target.startswith("/proc/")),
        "standard streams": [descriptors[name] for name in "012"],
    }


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return "/proc/"  # the listed folder itself


def _exit_with_15(_number: int, _frame: FrameType | None) -> None:
    os._exit(15)


def run(directory: Path) -> int:
    print("the program runs", flush=True)
    (directory / "facts.json.new").write_text(json.dumps(facts()))
    (directory / "facts.json.new").rename(directory / "facts.json")
    signal.signal(signal.SIGTERM, _exit_with_15)
    while not (directory / "exit").exists():
        threading.Event().wait(0.02)
    return int((directory / "exit").read_text())


def main() -> int:
    if sys.argv[1] != "fork-server":
        return run(Path(sys.argv[1]))
    control = socket.socket(fileno=os.dup(0))
    os.dup2(null := os.open(os.devnull, os.O_RDONLY), 0)
    os.close(null)
    fingerprint = CodeFingerprint()
    fingerprint.record()
    directory = ForkServer(control, fingerprint, {}).run()
    return 0 if directory is None else run(directory)


if __name__ == "__main__":
    sys.exit(main())
