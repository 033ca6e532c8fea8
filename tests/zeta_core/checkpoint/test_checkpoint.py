"""Checkpoints on disk are complete or absent, also after damage and kills at every file operation of a save."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from zeta_core.checkpoint import checkpoint_files
from zeta_core.contract.job.checkpoint import Manifest, ManifestFile
from zeta_core.contract.job.events import utc_now
from zeta_core.failures import CannotResume


def save(output_dir: Path, step: int, *, name: str | None = None, run_id: str = "run_1", keep: int = 2) -> None:
    """Save a checkpoint of two small files, update the pointer, and prune old checkpoints."""
    name = name or f"step-{step}"
    part = checkpoint_files.begin_checkpoint(output_dir, name)
    (part / "training_state").mkdir()
    (part / "model.safetensors").write_bytes(b"weights %d" % step)
    (part / "training_state" / "state.json").write_text(f'{{"step": {step}}}')

    def manifest(files: list[ManifestFile]) -> Manifest:
        about = {"run_id": run_id, "name": name, "format": "module", "step": step, "tokens": step}
        return Manifest.model_validate({**about, "created_at": utc_now(), "files": files})

    checkpoint_files.write_pointer(checkpoint_files.publish_checkpoint(part, output_dir, manifest), output_dir)
    checkpoint_files.prune_steps(output_dir, run_id, keep)


def find(given: Path, output_dir: Path) -> tuple[checkpoint_files.Checkpoint | None, list[str]]:
    warnings: list[str] = []
    return checkpoint_files.find_resumable(given, output_dir, lambda code, _: warnings.append(code)), warnings


def names(output_dir: Path) -> set[str]:
    return {path.name for path in output_dir.iterdir() if path.is_dir()}


def test_the_manifest_names_every_file_with_size_hash_and_role(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = checkpoint_files.read_checkpoint(tmp_path / "step-1")
    assert found is not None
    assert {(file.path, file.size, file.role) for file in found.manifest.files} == {
        ("model.safetensors", 9, "weights"),
        ("training_state/state.json", 11, "state"),
    }
    assert checkpoint_files.find_damage(found) is None


def test_only_the_newest_of_this_run_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 99, run_id="run_other", keep=3)
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == {"step-99", "step-3", "step-10"}


@pytest.mark.parametrize("given", [".", "step-3", "checkpoint.pt"])
@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "no manifest"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(given: str, harm: str, tmp_path: Path) -> None:
    for step in (2, 3):
        save(tmp_path, step)
    weights = tmp_path / "step-3" / "model.safetensors"
    match harm:
        case "cut":
            weights.write_bytes(b"wei")
        case "flip":
            weights.write_bytes(b"weighty 3")
        case "remove":
            weights.unlink()
        case _:
            (tmp_path / "step-3" / "manifest.json").unlink()
    found, warnings = find(tmp_path / given, tmp_path)
    assert found is not None
    assert found.directory.name == "step-2"
    assert warnings == (["damaged_checkpoint"] if harm != "no manifest" or given == "step-3" else [])


def test_a_run_with_only_damaged_checkpoints_is_rejected(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "step-3" / "model.safetensors").unlink()
    with pytest.raises(CannotResume, match="no complete checkpoint"):
        find(tmp_path, tmp_path)


def test_the_pointer_is_small_safe_to_load_and_useless_elsewhere(tmp_path: Path) -> None:
    output_dir = tmp_path / "out"
    save(output_dir, 3)
    pointer = output_dir / "checkpoint.pt"
    content = torch.load(pointer, weights_only=True)
    assert (content["name"], content["step"], content["run_id"]) == ("step-3", 3, "run_1")
    assert pointer.stat().st_size < 10_000
    elsewhere = tmp_path / "elsewhere" / "checkpoint.pt"
    elsewhere.parent.mkdir()
    shutil.copy(pointer, elsewhere)
    save(tmp_path / "another", 5, run_id="run_2")
    shutil.copy(pointer, tmp_path / "another" / "checkpoint.pt")
    for moved in (elsewhere, tmp_path / "another" / "checkpoint.pt"):
        with pytest.raises(CannotResume, match="move it back"):
            find(moved, output_dir)


def test_an_invalid_pointer_is_rejected_without_unpickling_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    pointer = tmp_path / "checkpoint.pt"
    torch.save({"name": Path("step-3")}, pointer)
    with pytest.raises(CannotResume, match=r"is not a checkpoint\.pt of this Trainer"):
        find(pointer, tmp_path)


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    for missing in (tmp_path / "nothing", tmp_path / "checkpoint.pt", tmp_path / "step-7"):
        with pytest.raises(CannotResume, match="does not exist"):
            find(missing, tmp_path)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    checkpoint_files.write_plan(tmp_path, "run_1", {})
    assert find(tmp_path / "checkpoint.pt", tmp_path) == (None, [])
    assert find(tmp_path, tmp_path) == (None, [])


def test_a_new_run_moves_an_earlier_ones_checkpoints_aside(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 3, name="final")
    moved = checkpoint_files.set_checkpoints_aside(tmp_path, after_step=None, run_id=None)
    assert moved == tmp_path / "earlier" / "run_1"
    assert names(tmp_path / "earlier" / "run_1") == {"step-3", "final"}
    assert not (tmp_path / "checkpoint.pt").exists()


def test_resuming_from_an_older_checkpoint_moves_the_later_ones_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=5)
    checkpoint_files.set_checkpoints_aside(tmp_path, after_step=2, run_id="run_1")
    assert names(tmp_path) == {"step-1", "step-2", "earlier"}


def test_a_new_final_keeps_the_older_one_as_a_step(tmp_path: Path) -> None:
    save(tmp_path, 3, name="final")
    save(tmp_path, 5, name="final")
    assert names(tmp_path) == {"step-3", "final"}
    assert all(checkpoint_files.find_damage(found) is None for found in checkpoint_files.list_checkpoints(tmp_path))


def test_after_success_only_the_newest_step_and_final_keep_their_state(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    newest = checkpoint_files.read_checkpoint(tmp_path / "step-2")
    assert newest is not None
    checkpoint_files.copy_checkpoint(newest, tmp_path, "final", independent=True)
    checkpoint_files.strip_old_states(tmp_path)
    states = {found.directory.name: found.has_state for found in checkpoint_files.list_checkpoints(tmp_path)}
    assert states == {"final": True, "step-2": True, "step-1": False}
    assert all(checkpoint_files.find_damage(found) is None for found in checkpoint_files.list_checkpoints(tmp_path))
    assert not (tmp_path / "step-1" / "training_state").exists()
    with pytest.raises(CannotResume, match="contains only weights: after a run has succeeded"):
        find(tmp_path / "step-1", tmp_path)
    (tmp_path / "final" / "model.safetensors").write_bytes(b"weighty 2")
    found, warnings = find(tmp_path, tmp_path)
    assert found is not None
    assert (found.directory.name, warnings) == ("step-2", ["damaged_checkpoint"]), "final is a separate copy"


def test_an_output_directory_may_be_named_like_a_checkpoint(tmp_path: Path) -> None:
    output_dir = tmp_path / "final"
    save(output_dir, 2)
    checkpoint_files.write_plan(output_dir, "run_1", {})
    found, warnings = find(output_dir, output_dir)
    assert found is not None
    assert (found.directory, warnings) == (output_dir / "step-2", [])


def _killed_at_operation(number: int, output_dir: Path) -> bool:
    """Save in a child process that is killed at its ``number``-th file operation. Returns whether it was killed."""
    child = os.fork()
    if child == 0:
        count = 0

        def on_event(event: str, _: tuple[object, ...]) -> None:
            nonlocal count
            if event == "open" or event.startswith(("os.", "shutil.")):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(on_event)
        save(output_dir, 3, keep=2)
        save(output_dir, 4, name="final", keep=2)
        save(output_dir, 5, name="final", keep=2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.extended
def test_a_kill_at_any_file_operation_of_a_save_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / "before", step)
    number, steps = 1, set[int]()
    while True:
        output_dir = tmp_path / "output"
        shutil.rmtree(output_dir, ignore_errors=True)
        shutil.copytree(tmp_path / "before", output_dir)
        killed = _killed_at_operation(number, output_dir)
        for given in (output_dir, output_dir / "checkpoint.pt"):
            found, _ = find(given, output_dir)
            assert found is not None
            assert found.manifest.step >= 2, "an older checkpoint is never lost"
            steps.add(found.manifest.step)
        checkpoint_files.remove_partial_files(output_dir)
        assert not [path for path in output_dir.iterdir() if ".part" in path.name or ".trash" in path.name]
        if not killed:
            break
        number += 1
    assert number > 60
    assert steps == {2, 3, 4, 5}
