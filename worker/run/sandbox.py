"""Decides what the processes of users' jobs may access, and writes it beside their run files.

A run, a check and a served model each get a `SandboxFile`: the libraries, the uploads and checkpoints that their spec
names, their own folders, and the cache of their project. The cache contains compiled code, so projects don't share it.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from worker.run.launch import hub_folder, own_environment, packages_of_zeta_core
from worker.settings import WorkerSettings
from zeta_core.contract.access import HubAccess
from zeta_core.contract.errors import ZetaError
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.spec.batch_spec import BatchSpec
from zeta_core.contract.spec.evaluation_spec import EvaluationSpec
from zeta_core.contract.spec.held_out import HeldOutData
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.kinds import SPEC_MODELS
from zeta_core.contract.spec.sources import (
    MODEL_SOURCE,
    FileModel,
    FileSource,
    FileTokenizer,
    JobModel,
    PathSource,
    dataset_sources,
)
from zeta_core.contract.spec.validation import parse
from zeta_core.contract.wire.answers import ServedWeights
from zeta_core.contract.wire.messages import CheckRequest
from zeta_core.contract.wire.run_directory import (
    LOCK_FILE,
    PROCESS_LIMIT_FILE,
    RunFile,
    checkpoint_key,
    file_key,
    project_cache,
    stored_model_key,
)
from zeta_core.contract.wire.sandbox import SANDBOX_FILE, SandboxFile
from zeta_core.system.durable_files import write_atomically
from zeta_core.system.sandbox import SHARED_MEMORY, SandboxSupport

_SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/sys", "/nix/store"),
    *("/opt/nvidia", "/opt/rocm", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives"),
    *("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/hosts", "/etc/resolv.conf", "/etc/host.conf"),
    *("/etc/gai.conf", "/etc/services", "/etc/protocols", "/etc/localtime", "/etc/timezone", "/etc/mime.types"),
    *("/etc/os-release", "/etc/debian_version", "/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/pki/tls/certs"),
    *("/etc/pki/tls/openssl.cnf", "/etc/pki/ca-trust/extracted", "/etc/ca-certificates", "/etc/OpenCL", "/etc/vulkan"),
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_GPU_DEVICES = ("nvidia*", "dri", "kfd", "infiniband", "gdrdrv")
_TRACKERS = ("WANDB_", "MLFLOW_")  # the variables of trackers that need the network
_HUB_FOLDERS = ("hub", "datasets", "xet")  # of HF_HOME; not its modules, which are code
_GLOB = frozenset("*?[")
_MODPROBE_SECONDS = 30.0
_EXTENSIONS = (".cache", "torch_extensions")  # in a home directory; DeepSpeed's are among them
TEMPORARY = "tmp"  # in the folder of a process
Locate = Callable[[PurePosixPath], Path]  # the path of an artifact on this machine, which is fetched first if needed


@dataclass(frozen=True)
class SandboxInputs:
    """The files that a spec names, which the process that runs it may read; it may only list ``listed`` folders."""

    paths: tuple[Path, ...] = ()
    listed: tuple[Path, ...] = ()

    @classmethod
    def of_spec(
        cls,
        spec: Mapping[str, Any],
        settings: WorkerSettings,
        locate: Locate,
        kind: JobKind = JobKind.TRAINING,
        *,
        bases: Iterable[str] = (),
        held_out: object = None,
    ) -> SandboxInputs:
        """The inputs of a job. A spec that is invalid here has none, and its process reports the error.

        ``held_out`` is the `HeldOutData` that an export reads. ``bases`` are the models that the server allows as
        bases of adapters. An adapter's own files, which a run has written, could name a model of another project.
        """
        try:
            parsed = parse(SPEC_MODELS[kind], spec)
        except ZetaError:
            return cls()
        found, listed = _model_paths(parsed.model, bases, locate), list[Path]()
        tokenizer = getattr(parsed, "tokenizer", None)  # some kinds of jobs have no tokenizer and no data
        if isinstance(tokenizer, FileTokenizer):
            found.append(locate(file_key(tokenizer.file)))
        if isinstance(parsed, BatchSpec):
            found.append(locate(file_key(parsed.input.file)))
        if isinstance(parsed, EvaluationSpec) and parsed.base is not None:
            found += _model_paths(parsed.base, (), locate)
        datasets = [getattr(parsed, name, None) for name in ("dataset", "eval_dataset")]
        if kind is JobKind.EXPORT and held_out is not None:
            with suppress(ValidationError):  # its process reports it
                datasets.append(HeldOutData.model_validate(held_out).dataset)
        for source in chain.from_iterable(map(dataset_sources, datasets)):
            match source:
                case FileSource():
                    found += [locate(file_key(file_id)) for file_id in source.file_ids]
                case PathSource() if settings.data_root is not None:
                    folders = _data_folders(settings.data_root, source.path, settings.home)
                    found += folders
                    listed += [] if settings.data_root in folders else [settings.data_root]
                case _:
                    continue
        return cls(tuple(found), tuple(listed))

    @classmethod
    def of_check(cls, request: CheckRequest, settings: WorkerSettings, locate: Locate) -> SandboxInputs:
        """The inputs of a check. A request that shows rows may have no model."""
        spec = request.spec if request.shown is None else {**JobSpec.placeholders, **request.spec}
        return cls.of_spec(spec, settings, locate, bases=request.bases)

    @classmethod
    def of_weights(cls, weights: ServedWeights, locate: Locate) -> SandboxInputs:
        """The inputs of a served model."""
        return cls(tuple(_model_paths(MODEL_SOURCE.validate_python(weights.model), weights.bases, locate)))


@dataclass(frozen=True)
class Sandboxes:
    """Writes the sandbox files of one worker. Without ``support``, it writes none, and nothing is restricted."""

    settings: WorkerSettings
    support: SandboxSupport | None

    def prepare_run(self, directory: Path, run_file: RunFile, inputs: SandboxInputs, devices: Sequence[str]) -> None:
        """Write the sandbox file of a run. Raises `OSError`."""
        if run_file.resume_from is not None:  # a damaged checkpoint is replaced by an earlier one of the same job
            inputs = replace(inputs, paths=(*inputs.paths, Path(run_file.resume_from).parent))
        self.prepare(
            directory,
            inputs=inputs,
            project=run_file.project,
            outputs=[Path(run_file.output_dir)],
            devices=devices,
            processes=run_file.processes,
            has_other_nodes=run_file.num_nodes > 1,
            environments=self._environments(run_file),
            hub=run_file.hub_access if run_file.hub else HubAccess.OFF,
        )
        if self.support is not None and run_file.spec.get("use_deepspeed"):
            with suppress(OSError):  # then the run compiles them
                self._copy_extensions(self.settings.root / project_cache(run_file.project))

    def prepare(
        self,
        directory: Path,
        *,
        inputs: SandboxInputs,
        project: str,
        hub: HubAccess,
        outputs: Iterable[Path] = (),
        devices: Sequence[str] = (),
        processes: int = 1,
        may_remove: bool = False,
        environments: Sequence[Path] = (),
        has_other_nodes: bool = False,
    ) -> None:
        """Write the sandbox file of ``directory``, and create the private folders that it names. Raises `OSError`.

        ``environments`` are folders in which the process may install packages. ``has_other_nodes``: it communicates
        with processes on other workers. ``may_remove``: it may also remove files directly in the directory, which
        contains no lock.
        """
        if self.support is None:
            return
        settings = self.settings
        cache = settings.root / project_cache(project)
        home, temporary = cache / "home", directory / TEMPORARY
        for folder in (home, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        os.utime(home, follow_symlinks=False)  # the cache evicts the least recently used entries
        keeps_network = bool(environments) or has_other_nodes or hub != HubAccess.OFF or self._has_tracker
        network = keeps_network or not self.support.namespaces
        hub_home = hub_folder(own_environment(), hub)
        downloads = [hub_home / name for name in _HUB_FOLDERS] if hub != HubAccess.OFF else []
        for folder in downloads:
            folder.mkdir(parents=True, exist_ok=True)
        token = [hub_home / "token"] if hub == HubAccess.OPERATOR_TOKEN else []
        variables = {"HOME": str(home), "TMPDIR": str(temporary)}
        if not network:
            variables |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        packages = packages_of_zeta_core()
        file = SandboxFile(
            readable=[*_libraries(settings), *map(str, (*inputs.paths, *token))],
            listable=[*map(str, inputs.listed), *([] if packages is None else [packages])],
            writable=[
                str(cache),
                *map(str, (*downloads, *environments)),
                *([] if self.support.namespaces else [SHARED_MEMORY]),
            ],
            outputs=[str(temporary), *map(str, outputs), *([str(directory)] if may_remove else [])],
            run_directory=None if may_remove else str(directory),
            devices=[*_DEVICES, *(_gpu_devices() if devices else ())],
            lock=None if may_remove else str(directory / LOCK_FILE),
            namespaces=self.support.namespaces,
            network=network,
            unix_sockets=processes > 1 or has_other_nodes,
            max_tasks=settings.job_processes * processes if self.support.limits_tasks else None,
            limit_file=str(directory / PROCESS_LIMIT_FILE),
            max_file_bytes=settings.job_file_bytes,
            variables=variables,
        )
        write_atomically(directory / SANDBOX_FILE, file.model_dump_json(indent=2).encode())

    def _environments(self, run_file: RunFile) -> list[Path]:
        """The folder in which an export to GGUF creates the converter's environment, which needs the network.

        It contains code, so projects don't share it.
        """
        if run_file.kind is not JobKind.EXPORT or run_file.environments_dir is None:
            return []
        if run_file.spec.get("to") != "gguf" or run_file.gguf_python is not None:
            return []
        folder = Path(run_file.environments_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return [folder]

    def _copy_extensions(self, cache: Path) -> None:
        """Give a project's cache the operator's compiled extensions of torch, which take a minute to compile.

        Runs may replace anything in the cache by symbolic links. So the copy is made outside of it, and moved without
        following a link.
        """
        source = Path(own_environment().get("HOME", "/"), *_EXTENSIONS)
        if not source.is_dir() or cache.joinpath("home", *_EXTENSIONS).exists():
            return
        parent, name = _EXTENSIONS
        with (
            tempfile.TemporaryDirectory(prefix=".extensions-", dir=self.settings.root) as staging,
            ExitStack() as stack,
        ):
            shutil.copytree(source, Path(staging, name))
            folder = stack.enter_context(_opened(cache, parent=None))
            for step in ("home", parent):
                with suppress(FileExistsError):
                    os.mkdir(step, dir_fd=folder)
                folder = stack.enter_context(_opened(step, parent=folder))
            with suppress(OSError):  # the run has created something in the meantime
                os.rename(Path(staging, name), name, dst_dir_fd=folder)

    @property
    def _has_tracker(self) -> bool:
        """Whether the operator has set up a tracker, which needs the network."""
        return any(name.startswith(_TRACKERS) for name in self.settings.job_env)


@contextmanager
def _opened(folder: str | Path, *, parent: int | None) -> Generator[int]:
    """A descriptor of the folder in ``parent``. Raises `OSError`, also if it is a symbolic link."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _model_paths(model: object, bases: Iterable[str], locate: Locate) -> list[Path]:
    """The stored files of a model, and of the models that an adapter may name as its base."""
    keys = [stored_model_key(name) for name in bases]
    if isinstance(model, FileModel):
        keys.append(file_key(model.file))
    elif isinstance(model, JobModel):
        keys.append(checkpoint_key(model.job, model.checkpoint))
    return [locate(key) for key in keys if key is not None]


def _data_folders(data_root: Path, pattern: str, home: Path) -> list[Path]:
    """The data root; if the service's home is inside it, what ``pattern`` may name outside of the home."""
    home = home.resolve()
    if not home.is_relative_to(data_root.resolve()):
        return [data_root]
    parts = list[str]()
    for part in Path(pattern).parts:
        if _GLOB & set(part):
            break
        parts.append(part)
    return list(_outside(home, data_root.joinpath(*parts)))


def _outside(home: Path, path: Path) -> Iterator[Path]:
    """``path``, or the parts of it that are neither the home nor inside it."""
    resolved = path.resolve()
    if resolved.is_relative_to(home):
        return
    if not home.is_relative_to(resolved):
        yield path
        return
    with suppress(OSError):  # the process reports a folder that can't be read
        for entry in sorted(path.iterdir()):
            yield from _outside(home, entry)


def _libraries(settings: WorkerSettings) -> list[str]:
    """The system's and Python's files, which contain no data of the service."""
    own = own_environment()
    paths = [sys.prefix, sys.base_prefix, sys.exec_prefix, *site.getsitepackages()]
    paths += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    paths += [*own.get("LD_LIBRARY_PATH", "").split(":"), own.get("CUDA_HOME", "")]
    packages = packages_of_zeta_core()
    if packages is not None:
        paths.append(str(Path(packages, "zeta_core")))
    paths += [str(path) for path in settings.sandbox_read]
    if settings.gguf_python is not None:  # ENVIRONMENT/bin/python, and the installation that it belongs to
        environments = [path.parent.parent for path in (settings.gguf_python, settings.gguf_python.resolve())]
        paths += [str(path) for path in environments if not settings.home.is_relative_to(path)]
    return list(dict.fromkeys([*_SYSTEM, *(path for path in paths if path.startswith("/") and path != "/")]))


def _gpu_devices() -> list[str]:
    """The device files of all GPUs. CUDA's set-user-ID program that creates missing ones has no effect in a sandbox."""
    program = shutil.which("nvidia-modprobe")
    if program is not None and not Path("/dev/nvidia-uvm").exists():
        with suppress(subprocess.TimeoutExpired):  # CUDA reports what is missing
            subprocess.run([program, "-u", "-c=0"], check=False, capture_output=True, timeout=_MODPROBE_SECONDS)
    return [str(path) for pattern in _GPU_DEVICES for path in sorted(Path("/dev").glob(pattern))]
