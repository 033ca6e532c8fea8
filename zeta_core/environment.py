"""The settings that a training process reads from its environment: its rank, its home, and variables of libraries."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import which
from typing import TextIO

from zeta_core.contract.wire.run_directory import JOB_VARIABLE
from zeta_core.failures import CannotTrain
from zeta_core.system.device_kind import KERNEL_VARIABLES
from zeta_core.system.oom_kills import group_files
from zeta_core.system.settings import Settings

COMPILED_CODE = "compiled"  # a folder in the cache
_COMPILED_BY_TORCH = "TORCHINDUCTOR_CACHE_DIR"
# Variables that indicate several processes but that torch does not read: those of MPI launchers, and of `srun`. Only
# `srun` sets the number of a step's tasks; the job's number of tasks is also set in an sbatch script.
_WORLD_SIZE_VARIABLES = (
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
# Settings that Accelerate would read from the environment, but that the Trainer decides itself.
_ACCELERATE_VARIABLES = ("ACCELERATE_USE_", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_", "ACCELERATE_GRADIENT_",
                 "ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS", "FSDP_")  # fmt: skip


@dataclass(frozen=True)
class ProcessRank:
    """The rank of this process, set by torchrun, ``accelerate launch`` or `process.launch`; a single process is 0 of 1.

    ``launched`` means that a launcher set the address of the process group. Nodes are the hosts of a job; each of them
    has folders of its own. The hosts of a script that torchrun started share their folders, and count as one node.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launched: bool = False
    address: str = ""
    node_rank: int = 0
    num_nodes: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        return self.is_main if self.num_nodes == 1 else self.local_rank == 0

    @property
    def ranks_per_node(self) -> int:
        return self.world_size // self.num_nodes

    def on_its_node(self) -> ProcessRank:
        """The same rank with its node, as torch elastic sets it for the ranks of a job."""
        if not self.launched:
            return self
        node_rank, num_nodes = os.environ.get("GROUP_RANK", "0"), os.environ.get("GROUP_WORLD_SIZE", "1")
        return replace(self, node_rank=int(node_rank), num_nodes=int(num_nodes))

    @classmethod
    def from_environment(cls) -> ProcessRank:
        """The rank of this process. Only a launcher's complete set of variables counts; ``RANK`` alone does not.

        Raises `CannotTrain` if the environment indicates several processes but not how they connect, because each
        process would then train separately on all the data.
        """
        environment = os.environ
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            for name in _WORLD_SIZE_VARIABLES:
                if environment.get(name, "1") not in ("", "1"):
                    raise _unconnected(
                        f"{name} is {environment[name]!r}, but no launcher set how the processes connect."
                    )
            if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environment.keys():  # set if several processes were requested
                raise _unconnected(
                    "`accelerate launch` started a single process without a rank, but several were requested."
                )
            return cls()
        rank = int(environment["RANK"])
        local_rank, world_size = int(environment.get("LOCAL_RANK", rank)), int(environment["WORLD_SIZE"])
        address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        return cls(rank, local_rank, world_size, launched=True, address=address)


def _unconnected(what: str) -> CannotTrain:
    how = "`torchrun --nproc-per-node N script.py` or `accelerate launch --multi_gpu --num_processes N script.py`"
    return CannotTrain(what, hint=f"Start them with {how}, also on CPUs; for a single process, unset the variable.")


def accelerate_variables() -> dict[str, str]:
    """The variables that configure Accelerate, set by ``accelerate launch``, its config file, or an earlier run."""
    return {name: value for name, value in os.environ.items() if name.startswith(_ACCELERATE_VARIABLES)}


def kernel_variables() -> dict[str, str]:
    """The variables of this process that select kernels."""
    return {name: os.environ[name] for name in KERNEL_VARIABLES if name in os.environ}


def replace_environment(values: Mapping[str, str]) -> None:
    """Replace the whole environment of this process."""
    os.environ.clear()
    os.environ.update(values)


def job_id() -> str | None:
    """The id of the job that this process trains, or ``None`` in a script."""
    return os.environ.get(JOB_VARIABLE)


def free_memory_bytes() -> int:
    """The memory that this process can still allocate: the kernel's available memory, within the cgroup's limit."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        free = min(free, int(limit) - int(used))
    except (OSError, ValueError, StopIteration):
        return free  # not Linux, or no cgroup limit
    return max(0, free)


def compiler() -> str | None:
    """The C++ compiler that torch would use: ``CXX``, or the first common one that is installed."""
    named = os.environ.get("CXX")
    return next((found for name in ((named,) if named else ("g++", "clang++", "c++")) if (found := which(name))), None)


def total_memory_bytes() -> int:
    """The total memory of this host, or of its cgroup (v1 or v2) if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in group_files("memory.max", "memory.limit_in_bytes"):
        try:
            total = min(total, int(file.read_text()))
        except (OSError, ValueError):
            continue  # missing, or no limit ("max")
    return total


def tracker_project() -> str:
    """The W&B project and MLflow experiment for runs: from their own variables, or the default."""
    return os.environ.get("WANDB_PROJECT") or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "zeta"


def home() -> Path:
    """``ZETA_HOME``, or ``~/.zeta``. It contains the token cache of a Trainer without a service."""
    return Settings.from_environment(
        {name: value for name, value in os.environ.items() if name.startswith("ZETA_HOME")}
    ).home


@contextmanager
def library_environment(cache: Path, *, deepspeed: bool, cuda: bool) -> Generator[None]:
    """Set the environment for libraries during a run, and restore it afterwards.

    Compiled kernels, which are code, are kept in ``cache``. Torch's default is a folder with a predictable name in
    /tmp, which another user of the machine may create first. Parts of torch set the variable to it when they are
    imported, so that value does not count as the choice of a user.

    Accelerate writes to the environment when it gets a plugin, and a second run of this process would inherit that.
    `strategy.check_launcher` has already compared Accelerate's variables with the Trainer's own settings.
    """
    before = dict(os.environ)
    for name in accelerate_variables():
        del os.environ[name]
    if _is_default_of_torch(os.environ.get(_COMPILED_BY_TORCH)):
        del os.environ[_COMPILED_BY_TORCH]
    compiled = (cache / COMPILED_CODE).absolute()
    if compiled.is_dir():
        os.utime(compiled)  # the worker's cache evicts the least recently used entries
    defaults = {"TOKENIZERS_PARALLELISM": "true", _COMPILED_BY_TORCH: str(compiled)}
    if cuda:
        defaults["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required by torch.use_deterministic_algorithms
    if deepspeed:
        # DeepSpeed accepts a world of one process, if its rank is set.
        defaults |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        if not cuda:
            defaults["DS_ACCELERATOR"] = "cpu"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if deepspeed:
        # DeepSpeed builds its C++ extensions with ninja, which is next to the interpreter in a virtual environment.
        interpreter_folder = str(Path(sys.executable).parent)
        if interpreter_folder not in os.environ.get("PATH", "").split(os.pathsep):
            os.environ["PATH"] = os.pathsep.join((interpreter_folder, os.environ.get("PATH", "")))
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def thread_variables(threads: int | None) -> dict[str, str]:
    """The variable that sets torch's number of threads at its import; none if the number is not fixed yet."""
    return {} if threads is None else {"OMP_NUM_THREADS": str(threads)}


def unless_set(values: Mapping[str, str]) -> dict[str, str]:
    """The variables that the environment does not set."""
    return {name: value for name, value in values.items() if not os.environ.get(name)}


@contextmanager
def variables(**values: str) -> Generator[None]:
    """Set environment variables for processes that are started within the context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def standard_output_reserved() -> Generator[TextIO]:
    """The real standard output, while whatever else is printed goes to standard error."""
    sys.stdout.flush()
    saved_output = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(saved_output, "w", encoding="utf-8", closefd=False) as out:
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(saved_output, 1)
        os.close(saved_output)


def _is_default_of_torch(folder: str | None) -> bool:
    """Whether torch keeps compiled kernels in this folder if nobody has chosen one: ``/tmp/torchinductor_<user>``."""
    if folder is None:
        return False
    parent, name = os.path.split(folder)
    return name.startswith("torchinductor_") and parent == os.path.abspath(tempfile.gettempdir())
