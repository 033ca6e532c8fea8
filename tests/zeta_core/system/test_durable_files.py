"""Durable writing: readers see the old or the complete new file, and failures leave no files behind."""

import contextlib
import errno
import os
import re
import stat
import threading
from pathlib import Path

import pytest

from tests.harness.disks import SmallDisk, can_mount
from zeta_core.system.durable_files import (
    create_durably,
    flush,
    part_path,
    private_part_file,
    rename_durably,
    write_atomically,
    write_durably,
    write_private_durably,
)

WRITERS = [write_durably, write_atomically]


@pytest.mark.parametrize("write", WRITERS)
def test_writing_creates_and_replaces_a_file_and_leaves_no_part(tmp_path: Path, write: object) -> None:
    assert callable(write)
    target = tmp_path / "plan.json"
    for content in (b"first, and longer", b"second"):
        write(target, content)
        assert target.read_bytes() == content
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("write", WRITERS)
def test_a_reader_never_sees_a_part_of_the_new_content(tmp_path: Path, write: object) -> None:
    assert callable(write)
    target = tmp_path / "state"
    contents = {bytes([number]) * 200_000 for number in range(8)}
    write(target, next(iter(contents)))
    done = threading.Event()

    def replace() -> None:
        try:
            for content in [*contents] * 5:
                write(target, content)
        finally:
            done.set()

    thread = threading.Thread(target=replace)
    thread.start()
    while not done.is_set():
        assert target.read_bytes() in contents
    thread.join()


@pytest.mark.parametrize("write", WRITERS)
def test_the_mode_follows_the_umask(tmp_path: Path, write: object) -> None:
    assert callable(write)
    before = os.umask(0o027)
    try:
        write(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_private_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    target = tmp_path / "login.json"
    target.write_text("readable by all")
    target.chmod(0o644)
    write_private_durably(target, "secret")
    assert target.read_text() == "secret"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [target]


def test_an_unused_private_part_is_removed_even_after_an_error(tmp_path: Path) -> None:
    def link_to_an_existing_file() -> None:
        with private_part_file(tmp_path / "secret", "text") as part:
            assert (part.parent, part.read_text()) == (tmp_path, "text")
            assert stat.S_IMODE(part.stat().st_mode) == 0o600
            os.link(part, part)

    with pytest.raises(FileExistsError):
        link_to_an_existing_file()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_can_be_flushed_and_renamed(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    part = part_path(target)
    part.mkdir()
    (part / "weights").write_bytes(b"w")
    flush(part / "weights")
    flush(part)
    rename_durably(part, target)
    assert (target / "weights").read_bytes() == b"w"
    assert not part.exists()


def test_a_given_part_is_used_instead_of_the_usual_one(tmp_path: Path) -> None:
    target = tmp_path / "owner.json"
    part_path(target).write_bytes(b"of another process")
    write_durably(target, b"ours", part=tmp_path / ".owner.json.8")
    assert target.read_bytes() == b"ours"
    assert part_path(target).read_bytes() == b"of another process"
    assert sorted(tmp_path.iterdir()) == sorted([target, part_path(target)])


def test_only_one_of_several_writers_creates_a_file(tmp_path: Path) -> None:
    target = tmp_path / "owner.json"
    created: list[bytes] = []

    def create(content: bytes) -> None:
        with contextlib.suppress(FileExistsError):
            create_durably(target, content)
            created.append(content)

    threads = [threading.Thread(target=create, args=(bytes([number]) * 10_000,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [target.read_bytes()] == created
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(not can_mount(), reason="needs a small file system of its own")
def test_a_full_disk_leaves_the_old_content(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path / "disk", megabytes=1)
    try:
        target = disk.directory / "plan.json"
        write_durably(target, b"old")
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.ENOSPC))):
            write_durably(target, bytes(2**21))
        assert target.read_bytes() == b"old"
    finally:
        disk.close()
