"""Access to a model's files, whether they are in an archive or in a folder."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from zeta_core.contract.model_json.faults import InvalidModelFiles
from zeta_core.system.model_files.archive import Member, read_members


class ModelFiles(Protocol):
    """The files of a model. ``name`` is for messages; ``sizes`` maps their relative POSIX paths to bytes."""

    @property
    def name(self) -> str: ...

    @property
    def sizes(self) -> Mapping[str, int]: ...

    def open(self, path: str) -> BinaryIO: ...


class ArchiveFiles:
    """The files in an uncompressed tar. Raises `InvalidModelFiles` if `archive` rejects it."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self._path = path
        with path.open("rb") as file:
            members = read_members(file, os.fstat(file.fileno()).st_size, name)
        self._members = {member.name: member for member in members}
        self.sizes = {member.name: member.size for member in members}

    def open(self, path: str) -> BinaryIO:
        return io.BufferedReader(_Section(self._path, self._members[path]))


class FolderFiles:
    """The files below a folder. Links must lead to files below the folder or ``roots``; others are rejected."""

    def __init__(self, folder: Path, name: str, *, roots: tuple[Path, ...] = ()) -> None:
        self.name = name
        self._folder = folder
        inside = [root.resolve() for root in (folder, *roots)]
        sizes: dict[str, int] = {}
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder).as_posix()
            if any(part.startswith(".") for part in path.relative_to(folder).parts):
                continue
            if not any(path.resolve().is_relative_to(root) for root in inside):
                raise InvalidModelFiles(f"{name} contains {relative!r}, a link to a file outside; copy that file.")
            if path.is_file():
                sizes[relative] = path.stat().st_size
        self.sizes = sizes

    def open(self, path: str) -> BinaryIO:
        return self.source(path).open("rb")

    def source(self, path: str) -> Path:
        """The path of a file, with links resolved."""
        return (self._folder / path).resolve()


class _Section(io.RawIOBase):
    """A stream of the bytes of one member."""

    def __init__(self, path: Path, member: Member) -> None:
        super().__init__()
        self._file = path.open("rb", buffering=0)
        self._file.seek(member.offset)
        self._left = member.size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview | bytearray, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        view = memoryview(buffer)[: self._left]
        num_read = self._file.readinto(view) or 0
        self._left -= num_read
        return num_read

    def close(self) -> None:
        self._file.close()
        super().close()
