"""Starts the first process of a run, in its own session and with an allow-listed environment.

A run gets the variables for Python, CUDA, NCCL, kernel selection, the Hub and proxies, the names in ``ZETA_JOB_ENV``,
and its marks. Nothing else is passed on from the worker's environment, so no secret of the service reaches the code of
a user's job.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from worker.run.processes import run_mark, share_lock
from zeta_core.contract.access import HubAccess
from zeta_core.contract.wire.run_directory import ATTEMPT_VARIABLE, JOB_VARIABLE, LOG_FILE, RUN_VARIABLE
from zeta_core.system.device_kind import KERNEL_VARIABLES

TRAINER_COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "zeta_core")  # -P: nothing is imported from RUN_DIR
PASSED = (
    *("HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_HOME"),
    *("HF_TOKEN", "HF_HOME", "HF_ENDPOINT"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *KERNEL_VARIABLES,
)
_HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE")  # as huggingface_hub reads them
PASSED_PREFIXES = ("LC_", "GLOO_", "NCCL_", "TORCH_NCCL_", "TORCH_FR_")
FLIGHT_RECORDER_ENTRIES = 2000  # collective operations that each rank keeps, to be written if one of them hangs
OOM_SCORE_ADJUSTMENT = 500  # of 1000: as if it used an additional half of the machine's memory
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run_environment(
    own: Mapping[str, str],
    *,
    job_id: str,
    attempt: int,
    threads: int,
    devices: Sequence[str],
    hub: HubAccess,
    job_env: Sequence[str],
    directory: Path | None = None,
) -> dict[str, str]:
    """The complete environment of a run; ``own`` is the worker's. Without ``devices`` no GPU is visible.

    Only with ``operator-token`` does it contain a token of the Hub or the folder of one.

    With several, each rank records its latest collective operations; if one hangs, NCCL's watchdog writes them into the
    run ``directory``.
    """
    environment = {
        name: value
        for name, value in own.items()
        if name in PASSED or name.startswith(PASSED_PREFIXES) or (name in job_env and not name.startswith("ZETA_"))
    }
    beside = str(Path(sys.executable).parent)  # ninja and torchrun are installed beside the interpreter
    environment["PATH"] = os.pathsep.join((beside, own.get("PATH", DEFAULT_PATH)))
    environment.update(
        {
            JOB_VARIABLE: job_id,
            ATTEMPT_VARIABLE: str(attempt),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(devices),
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads slow down neighbours by a factor of two or more
            "PYTHONUNBUFFERED": "1",
        }
    )
    environment.setdefault("USE_HUB_KERNELS", "0")  # the Hub's kernels are code; ZETA_JOB_ENV may allow them
    if len(devices) > 1 and directory is not None:
        environment.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", str(FLIGHT_RECORDER_ENTRIES))
        environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        environment.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(directory / "nccl-trace-rank-"))
    if hub == HubAccess.OFF:
        environment["HF_HUB_OFFLINE"] = "1"
    if hub != HubAccess.OPERATOR_TOKEN:
        for name in _HUB_TOKENS:
            environment.pop(name, None)
    environment["HF_HOME"] = str(hub_folder(own, hub))  # a sandbox changes HOME
    packages = packages_of_zeta_core()
    if packages is not None:
        environment["PYTHONPATH"] = packages
    return environment


def hub_home(own: Mapping[str, str]) -> Path:
    """The folder of the Hub's libraries: the token of `hf auth login`, and caches."""
    return Path(own.get("HF_HOME") or Path(own.get("HOME") or "/", ".cache", "huggingface"))


def hub_folder(own: Mapping[str, str], hub: HubAccess) -> Path:
    """The folder of the Hub's libraries for a run, without the operator's token unless the run may use it.

    The cache of the token may contain private models. Without a token there is nothing to hide, and all projects share
    one cache and the warm start.
    """
    home = hub_home(own)
    has_token = any(own.get(name) for name in _HUB_TOKENS) or (home / "token").exists()
    return home / "public" if has_token and hub != HubAccess.OPERATOR_TOKEN else home


def start_run(command: Sequence[str], run_directory: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start ``command RUN_DIR`` with its output appended to ``train.log``. Raises `OSError` if it cannot be started."""
    lock = share_lock(run_directory)
    try:
        with (run_directory / LOG_FILE).open("ab") as log:
            process = subprocess.Popen(
                [*command, str(run_directory)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=run_directory,
                env={**environment, RUN_VARIABLE: run_mark(run_directory)},
                start_new_session=True,
                pass_fds=(lock,),
            )
    finally:
        os.close(lock)
    make_preferred_when_memory_runs_out(process.pid)
    return process


def make_preferred_when_memory_runs_out(pid: int) -> None:
    """Make the kernel kill a run before the worker, the server or Redis; child processes inherit this."""
    with suppress(OSError):  # not Linux, or the process has exited
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(OOM_SCORE_ADJUSTMENT))


def own_environment() -> Mapping[str, str]:
    """This process's environment, from which a run's environment is built."""
    return os.environ  # noqa: TID251 - a child's environment is built only from this


def packages_of_zeta_core() -> str | None:
    """The folder that contains ``zeta_core``, if it is a checkout rather than an installed package."""
    spec = importlib.util.find_spec("zeta_core")
    assert spec is not None, "zeta_core.contract is imported from it"
    assert spec.origin is not None, "zeta_core is a package with an __init__.py"
    folder = Path(spec.origin).parent.parent
    return None if folder.name in ("site-packages", "dist-packages") else str(folder)
