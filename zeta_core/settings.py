"""What a training process reads from its environment, once: its place among the ranks and where its home is."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from zeta_core.contract.device_kind import KERNEL_VARIABLES
from zeta_core.contract.layout import MARK_JOB
from zeta_core.contract.oom import group_files
from zeta_core.contract.settings import Settings
from zeta_core.failures import CannotTrain

# What says that this is one of several processes in words that torch does not read: of MPI's launchers, by their kind,
# and of `srun`, which alone sets the number of a step's tasks (that of the job is there in an sbatch script, too).
_SEVERAL = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
# What Accelerate would take from the environment and the Trainer decides by itself.
_DECIDED_HERE = ("ACCELERATE_USE_", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_", "ACCELERATE_GRADIENT_",
                 "ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS", "FSDP_")  # fmt: skip


@dataclass(frozen=True)
class Place:
    """This process among those of its run, as torchrun, ``accelerate launch`` or `launch` told it; alone: 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launched: bool = False  # a launcher gave the address of the others
    address: str = ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def place() -> Place:
    """The place of this process. Only a launcher's whole set of variables counts; a lone ``RANK`` does not.

    Raises `CannotTrain` where something promises several processes and does not say how they find one another: each
    would train alone on all the data.
    """
    environment = os.environ
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        for name in _SEVERAL:
            if environment.get(name, "1") not in ("", "1"):
                raise _unconnected(f"{name} is {environment[name]!r}, and no launcher says how the processes connect.")
        if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environment.keys():  # what it sets where it was asked for several
            raise _unconnected("`accelerate launch` was asked for several processes and started one, without a rank.")
        return Place()
    rank = int(environment["RANK"])
    local_rank, world_size = int(environment.get("LOCAL_RANK", rank)), int(environment["WORLD_SIZE"])
    address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    return Place(rank, local_rank, world_size, launched=True, address=address)


def _unconnected(what: str) -> CannotTrain:
    how = "`torchrun --nproc-per-node N script.py` or `accelerate launch --multi_gpu --num_processes N script.py`"
    return CannotTrain(what, hint=f"Start them with {how}, on CPUs too; for one process, unset it.")


def asked_of_accelerate() -> dict[str, str]:
    """What ``accelerate launch``, its config or something left over asks of Accelerate, by the variables' names."""
    return {name: value for name, value in os.environ.items() if name.startswith(_DECIDED_HERE)}


def kernel_variables() -> dict[str, str]:
    """The variables that select kernels, as they are set for this process."""
    return {name: os.environ[name] for name in KERNEL_VARIABLES if name in os.environ}


def job_id() -> str | None:
    """The job that this process trains, or ``None`` in a script."""
    return os.environ.get(MARK_JOB)


def free_memory_bytes() -> int:
    """Memory that this process can still have: what the kernel calls available, within the control group's limit."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        free = min(free, int(limit) - int(used))
    except (OSError, ValueError, StopIteration):
        return free  # no Linux, or no limit: what is known so far
    return max(0, free)


def compiler() -> str | None:
    """The C++ compiler that torch would use: the one that ``CXX`` names, else the first of the usual ones."""
    named = os.environ.get("CXX")
    return next((found for name in ((named,) if named else ("g++", "clang++", "c++")) if (found := which(name))), None)


def total_memory_bytes() -> int:
    """All the memory that the processes of this host, or of its control group of either version, can have."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in group_files("memory.max", "memory.limit_in_bytes"):
        try:
            total = min(total, int(file.read_text()))
        except (OSError, ValueError):
            continue  # not there, or no limit ("max")
    return total


def tracker_project() -> str:
    """The project of W&B and the experiment of MLflow that runs appear under: as their own variables say, or ours."""
    return os.environ.get("WANDB_PROJECT") or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "zeta"


def home() -> Path:
    """``ZETA_HOME``, else ``~/.zeta``: the token cache of a Trainer without a service lies under it."""
    return Settings.from_environment(
        {name: value for name, value in os.environ.items() if name.startswith("ZETA_HOME")}
    ).home


@contextmanager
def library_environment(*, deepspeed: bool, cuda: bool) -> Generator[None]:
    """What libraries read from the environment while a run lasts; afterwards it is as it was.

    Accelerate itself writes into it when it is given a plugin, and a second run of this process would inherit that.
    What it would take from there, `strategy.check_launcher` has held against the Trainer's own words.
    """
    before = dict(os.environ)
    for name in asked_of_accelerate():
        del os.environ[name]
    defaults = {"TOKENIZERS_PARALLELISM": "true"}
    if cuda:
        defaults["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch.use_deterministic_algorithms asks for it
    if deepspeed:
        # One process alone is a legal DeepSpeed world, once it knows that it is the first of one.
        defaults |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        if not cuda:
            defaults["DS_ACCELERATOR"] = "cpu"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if deepspeed:
        # DeepSpeed builds its C++ parts with ninja, which lies beside the interpreter in a virtual environment.
        beside = str(Path(sys.executable).parent)
        if beside not in os.environ.get("PATH", "").split(os.pathsep):
            os.environ["PATH"] = os.pathsep.join((beside, os.environ.get("PATH", "")))
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def variables(**values: str) -> Generator[None]:
    """Variables for the processes that are started within it."""
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
