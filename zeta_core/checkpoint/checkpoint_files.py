"""Checkpoints on disk: listing, verifying, publishing and deleting them.

Guarantees: a checkpoint directory is published by one rename, after all its files and its manifest were flushed to
disk. ``checkpoint.pt`` and manifests are replaced atomically. Old checkpoints are deleted only after a newer one is
published. If a process is killed at any time, all published checkpoints remain complete. This requires a file system
whose rename and fsync conform to POSIX. The ranks of a node share ``output_dir``, and only the first rank publishes
checkpoints. Before a checkpoint is read, the sizes and hashes of all its files are compared with the manifest.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zeta_core.contract.job.checkpoint import BEST_CHECKPOINT, FINAL_CHECKPOINT, FileRole, Manifest, ManifestFile
from zeta_core.contract.job.evaluation import RESULT_FILE
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, TRAINING_STATE_NAME
from zeta_core.failures import CannotResume
from zeta_core.system.durable_files import PART_SUFFIX, flush, rename_durably, write_durably
from zeta_core.system.file_hash import file_sha256

POINTER = "checkpoint.pt"
PLAN = "plan.json"
EARLIER = "earlier"
TRASH = ".trash-"
_CONFIG_FILES = ("config.json", "generation_config.json", "README.md", "Modelfile", "certificate.json")
_NAME = re.compile(r"^(step-\d+|best|final)$")


@dataclass(frozen=True)
class Checkpoint:
    """A directory with a readable manifest; `find_damage` checks its files against it."""

    directory: Path
    manifest: Manifest

    @property
    def has_state(self) -> bool:
        return any(file.role == "state" for file in self.manifest.files)

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.manifest.files)


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_checkpoint(directory: Path) -> Checkpoint | None:
    """The checkpoint in a directory; None if it has no readable manifest."""
    try:
        return Checkpoint(directory, Manifest.model_validate_json((directory / MANIFEST_NAME).read_bytes()))
    except (OSError, ValueError):
        return None


def list_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The checkpoints of an output directory, the newest first."""
    if not output_dir.is_dir():
        return []
    checkpoints = [read_checkpoint(path) for path in output_dir.iterdir() if _NAME.match(path.name)]
    return sorted(
        (checkpoint for checkpoint in checkpoints if checkpoint is not None),
        key=lambda checkpoint: (checkpoint.manifest.step, checkpoint.directory.name == FINAL_CHECKPOINT),
        reverse=True,
    )


def find_damage(checkpoint: Checkpoint) -> str | None:
    """The first difference between a checkpoint's files and its manifest, by size and hash; None if there is none."""
    for file in checkpoint.manifest.files:
        path = checkpoint.directory / file.path
        try:
            size = path.stat().st_size
            if size != file.size:
                return f"{file.path} has {size} bytes instead of {file.size}"
            if file_sha256(path) != file.sha256:
                return f"{file.path} does not have the hash of its manifest"
        except OSError as error:
            return f"{file.path} cannot be read ({error.strerror})"
    return None


def find_resumable(path: Path, output_dir: Path, warn: Callable[[str, str], None]) -> Checkpoint | None:
    """The newest valid checkpoint that ``resume_from_checkpoint`` refers to. Warns of each newer one that is damaged.

    ``path`` is a checkpoint directory, an output directory, or its ``checkpoint.pt``. Returns None if the run of this
    ``output_dir`` was started but has no checkpoint yet, so it starts again. Raises `CannotResume`.
    """
    if path.name == POINTER or path.is_file():
        candidates = _pointed_at(path, output_dir)
    elif (path / MANIFEST_NAME).exists() or (_NAME.match(path.name) and not (path / PLAN).is_file()):
        if not path.is_dir():
            raise CannotResume(f"resume_from_checkpoint is {str(path)!r}, which does not exist; name a checkpoint.")
        named = read_checkpoint(path)
        if named is None:
            warn("damaged_checkpoint", f"{path.name} has no readable manifest; using the previous checkpoint.")
        newest = list_checkpoints(path.parent)
        candidates = [c for c in newest if named is None or c.manifest.step <= named.manifest.step]
        if named is not None:
            candidates = [named, *(c for c in candidates if c.directory.resolve() != path.resolve())]
    elif path.is_dir():
        candidates = list_checkpoints(path)
    else:
        raise CannotResume(
            f"resume_from_checkpoint is {str(path)!r}, which does not exist; name a checkpoint directory, an "
            f"output_dir or its {POINTER}, or omit it to start a new run."
        )
    for checkpoint in candidates:
        if not checkpoint.has_state:
            continue
        problem = find_damage(checkpoint)
        if problem is None:
            return checkpoint
        warn("damaged_checkpoint", f"{checkpoint.directory.name} is damaged: {problem}. Using the previous checkpoint.")
    folder = path.parent if path.name == POINTER else path
    if candidates and not any(checkpoint.has_state for checkpoint in candidates):
        raise CannotResume(
            f"resume_from_checkpoint is {str(path)!r}, which contains only weights: after a run has succeeded, only "
            f"final, best and the newest step keep their {TRAINING_STATE_NAME}. Resume from one of them, or use this "
            "directory as model to start from its weights."
        )
    if not candidates and folder.resolve() == output_dir.resolve() and (output_dir / PLAN).is_file():
        return None
    raise CannotResume(
        f"resume_from_checkpoint is {str(path)!r}, which has no complete checkpoint with a {TRAINING_STATE_NAME}; "
        "omit it to start a new run."
    )


def _pointed_at(pointer: Path, output_dir: Path) -> list[Checkpoint]:
    """The checkpoint that a ``checkpoint.pt`` names, followed by the others of its run."""
    folder = pointer.parent
    if not pointer.is_file():
        if folder.resolve() == output_dir.resolve() and (output_dir / PLAN).is_file():
            return list_checkpoints(folder)
        raise CannotResume(
            f"resume_from_checkpoint is {str(pointer)!r}, which does not exist; name a checkpoint directory or an "
            "output_dir, or omit it to start a new run."
        )
    try:
        content = torch.load(pointer, weights_only=True)
        name, digest = str(content["name"]), str(content["manifest_sha256"])
        run_id = str(content["run_id"])
    except Exception as error:
        raise CannotResume(
            f"{pointer} is not a {POINTER} of this Trainer ({type(error).__name__}: {error})."
        ) from error
    same_run = [checkpoint for checkpoint in list_checkpoints(folder) if checkpoint.manifest.run_id == run_id]
    if not same_run:
        raise CannotResume(
            f"{pointer} refers to {name!r} of {run_id}, but its directory has no checkpoint of that run. The file "
            "contains no weights; name the output_dir in which it was written, or move it back there."
        )
    named = [c for c in same_run if c.directory.name == name and file_sha256(c.directory / MANIFEST_NAME) == digest]
    return [*named, *(c for c in same_run if c not in named)]


# --- Writing ----------------------------------------------------------------------------------------------------------


def begin_checkpoint(output_dir: Path, name: str) -> Path:
    """Create an empty directory in which a checkpoint is written before it is published."""
    part = output_dir / f"{name}{PART_SUFFIX}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def publish_checkpoint(part: Path, output_dir: Path, manifest: Callable[[list[ManifestFile]], Manifest]) -> Checkpoint:
    """Flush and hash every file, write the manifest last, and give the directory its name by one rename."""
    files: list[ManifestFile] = []
    for path in sorted(part.rglob("*")):
        if path.is_file():
            flush(path)
            relative = path.relative_to(part).as_posix()
            size = path.stat().st_size
            files.append(ManifestFile(path=relative, size=size, sha256=file_sha256(path), role=_role(relative)))
    content = manifest(files)
    write_durably(part / MANIFEST_NAME, content.model_dump_json(indent=1).encode())
    for folder in [*(path for path in part.rglob("*") if path.is_dir()), part]:
        flush(folder)
    target = output_dir / content.name
    replaced = read_checkpoint(target)
    as_step: Path | None = None
    if replaced is not None and target.name in (FINAL_CHECKPOINT, BEST_CHECKPOINT):
        as_step = _rename_as_step(replaced)  # so a checkpoint exists at all times
    elif target.exists():
        discard(target)
    rename_durably(part, target)
    if as_step is not None and target.name == BEST_CHECKPOINT:
        discard(as_step)  # an older final remains as a checkpoint of its step; there is only one best
    return Checkpoint(target, content)


def copy_checkpoint(checkpoint: Checkpoint, output_dir: Path, name: str, *, independent: bool = False) -> Checkpoint:
    """Publish the same checkpoint under another name, with hard links to its files.

    If ``independent``, and if there is plenty of disk space, files are copied, so damage to one does not affect the
    other.
    """
    independent = independent and shutil.disk_usage(output_dir).free > 4 * checkpoint.size_bytes
    part = begin_checkpoint(output_dir, name)
    for file in checkpoint.manifest.files:
        source, target = checkpoint.directory / file.path, part / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            (shutil.copy2 if independent else os.link)(source, target)
        except OSError:  # a file system without hard links, or the disk is full
            target.unlink(missing_ok=True)
            (os.link if independent else shutil.copy2)(source, target)
    return publish_checkpoint(part, output_dir, lambda _: checkpoint.manifest.model_copy(update={"name": name}))


def write_pointer(checkpoint: Checkpoint, output_dir: Path) -> None:
    """Replace ``checkpoint.pt``, a small file that names a checkpoint and contains no weights."""
    manifest = checkpoint.manifest
    content: dict[str, Any] = {
        "name": checkpoint.directory.name,
        "step": manifest.step,
        "run_id": manifest.run_id,
        "manifest_sha256": file_sha256(checkpoint.directory / MANIFEST_NAME),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_durably(output_dir / POINTER, buffer.getvalue())


def write_plan(output_dir: Path, run_id: str, plan: dict[str, Any]) -> None:
    """Write ``plan.json``, which identifies the run of this directory before its first checkpoint."""
    write_durably(output_dir / PLAN, json.dumps({"run_id": run_id, **plan}, indent=1).encode())


def read_plan(path: Path) -> dict[str, Any]:
    """The plan of the run that ``resume_from_checkpoint`` refers to, read without its weights; empty if missing."""
    files = (path / TRAINING_STATE_NAME / "state.json", path / PLAN, path.parent / PLAN)
    for file in files:
        try:
            content = json.loads(file.read_text())
            return dict(content["plan"] if file is files[0] else content)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # `find_resumable` reports what is missing or damaged
    return {}


def prune_steps(output_dir: Path, run_id: str, keep: int) -> None:
    """Remove all but the ``keep`` newest ``step-N`` of this run."""
    steps = [
        c for c in list_checkpoints(output_dir) if c.directory.name.startswith("step-") and c.manifest.run_id == run_id
    ]
    for checkpoint in steps[keep:]:
        discard(checkpoint.directory)


def strip_old_states(output_dir: Path) -> None:
    """Remove the training state of all but ``final``, ``best`` and the newest ``step-N``, after success."""
    steps = [c for c in list_checkpoints(output_dir) if c.directory.name.startswith("step-")]
    for checkpoint in steps[1:]:
        if checkpoint.has_state:
            files = [file for file in checkpoint.manifest.files if file.role != "state"]
            manifest = checkpoint.manifest.model_copy(update={"files": files})
            write_durably(checkpoint.directory / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode())
            shutil.rmtree(checkpoint.directory / TRAINING_STATE_NAME)


def discard(directory: Path) -> None:
    """Remove a directory; it is renamed first, so its remains are never taken for a checkpoint."""
    trash = directory.with_name(f"{TRASH}{directory.name}")
    shutil.rmtree(trash, ignore_errors=True)
    directory.rename(trash)
    shutil.rmtree(trash)


def remove_partial_files(output_dir: Path) -> None:
    """Remove files that a killed process was writing or removing."""
    for path in list(output_dir.iterdir()) if output_dir.is_dir() else []:
        if path.name.startswith(TRASH) or (path.name.endswith(PART_SUFFIX) and path.is_dir()):
            shutil.rmtree(path)
        elif path.name.endswith(PART_SUFFIX):
            path.unlink()


def set_checkpoints_aside(output_dir: Path, *, after_step: int | None, run_id: str | None) -> Path | None:
    """Move other runs' checkpoints to ``earlier/<run_id>/``. Returns the last target; None if nothing was moved.

    A new run (``after_step`` is None) moves everything. A resumed run also moves its own checkpoints after the step
    that it resumes from.
    """
    moved: Path | None = None
    for path in _checkpoint_paths(output_dir):
        checkpoint = read_checkpoint(path)
        same_run = checkpoint is not None and checkpoint.manifest.run_id == run_id
        if after_step is not None and same_run and checkpoint is not None and checkpoint.manifest.step <= after_step:
            continue
        owner = checkpoint.manifest.run_id if checkpoint is not None else "damaged"
        folder = _free(output_dir / EARLIER / (f"{owner}-after-step-{after_step}" if same_run else owner), path.name)
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
        moved = folder
    if after_step is None:
        (output_dir / POINTER).unlink(missing_ok=True)
    return moved


def _checkpoint_paths(output_dir: Path) -> Iterator[Path]:
    if output_dir.is_dir():
        yield from sorted(path for path in output_dir.iterdir() if _NAME.match(path.name))


def _free(folder: Path, name: str) -> Path:
    number = 1
    free = folder
    while (free / name).exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _rename_as_step(checkpoint: Checkpoint) -> Path | None:
    """Rename an older checkpoint to ``step-N``; discard it and return None if that exists, as it is the same."""
    step = checkpoint.directory.with_name(f"step-{checkpoint.manifest.step}")
    if step.exists():
        discard(checkpoint.directory)
        return None
    manifest = checkpoint.manifest.model_copy(update={"name": step.name})
    write_durably(checkpoint.directory / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode())
    checkpoint.directory.rename(step)
    return step


def _role(relative: str) -> FileRole:
    name = relative.rpartition("/")[2]
    if relative.startswith(f"{TRAINING_STATE_NAME}/"):
        return "state"
    if name.endswith(".jsonl") or name == RESULT_FILE:
        return "results"  # of a batch or an evaluation
    if name.startswith("adapter_"):
        return "adapter"
    if name.endswith(".gguf") or (name.startswith("model") and name.endswith((".safetensors", ".index.json"))):
        return "weights"
    return "config" if name in _CONFIG_FILES else "tokenizer"
