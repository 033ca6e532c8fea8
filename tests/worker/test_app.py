"""How the worker's process ends."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Opening a pipe that has no writer blocks forever, like reading from an unreachable file server.
STUCK = """
import logging, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from worker import app

logging.basicConfig()
app.THREAD_EXIT_SECONDS = 0.2
executor = ThreadPoolExecutor(1, thread_name_prefix="store")
executor.submit(Path(sys.argv[1]).read_bytes)
executor.shutdown(wait=False, cancel_futures=True)
app.end_stuck_threads(3)
print("returned")
"""


def test_a_thread_blocked_by_a_hanging_store_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hanging")
    command = [sys.executable, "-c", STUCK, str(tmp_path / "hanging")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (3, "")
    assert "these threads are still running: store_0" in done.stderr
