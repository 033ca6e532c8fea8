"""Lists the members of an uncompressed tar by reading only its headers.

Python's `tarfile` expands sparse members, which lets a small archive claim any size, and reads extended headers of any
length (CVE-2024-6232 in some versions made it hang). This reader accepts what ``tar`` and `tarfile` write for plain
files and folders: ustar headers, long names of GNU tar, and pax headers with ``path`` and ``size``. The format is
described in POSIX.1-2017, "pax", and in the manual of GNU tar, "Basic Tar Format".

Guarantees for the result: every member lies inside the archive and overlaps no other, its name is a relative path that
stays inside the folder that it is unpacked to, and no two names mean the same file on any file system.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from zeta_core.contract.model_json.faults import InvalidModelFiles

BLOCK = 512
MAX_MEMBERS = 20_000
MAX_EXTENSION_BYTES = 64 * 1024  # of one pax header or long name
MAX_NAME_BYTES, MAX_PART_BYTES = 1024, 255  # a path, and one name in it: what Linux file systems allow
_FILE, _FOLDER = b"0\0" + b"7", b"5"  # 7 is a "contiguous" file, stored like any other
_LINKS, _DEVICES, _SPARSE = b"12", b"346", b"S"
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = b"x", b"g", b"L", b"K"


@dataclass(frozen=True)
class Member:
    """A file in an archive: ``size`` bytes at ``offset``."""

    name: str
    offset: int
    size: int


def read_members(file: BinaryIO, num_bytes: int, filename: str) -> list[Member]:
    """The files in a tar of ``num_bytes``. Raises `InvalidModelFiles` with the name of the member."""
    names = _Names(filename)
    members: list[Member] = []
    for name, kind, offset, size in _headers(file, num_bytes, filename):
        path = names.add(name, is_folder=kind in _FOLDER)
        if path is not None and kind not in _FOLDER:
            members.append(Member(path, offset, size))
    return members


def _headers(file: BinaryIO, num_bytes: int, filename: str) -> Iterator[tuple[str, bytes, int, int]]:
    """Name, type, offset and size of each file and folder."""
    offset, num_members = 0, 0
    extended: dict[str, str] = {}
    while offset + BLOCK <= num_bytes:
        file.seek(offset)
        header = file.read(BLOCK)
        if header.count(0) == BLOCK:  # the end of the archive
            break
        _check_sum(header, offset, filename)
        kind, size = header[156:157], _number(header[124:136], "size", filename)
        offset += BLOCK
        if kind in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
            if size > MAX_EXTENSION_BYTES:
                raise InvalidModelFiles(
                    f"{filename} has an extended header of {size} bytes at byte {offset}; at most "
                    f"{MAX_EXTENSION_BYTES} are read. Tar the model's files again."
                )
            extended |= _extension(kind, _content(file, offset, size, num_bytes, filename), filename)
            offset += _padded(size)
            continue
        # If an extension has the name, the header's is ignored: tar truncates it there, even within a character.
        name = extended["path"] if "path" in extended else _ustar_name(header, filename)
        if "size" in extended:
            size = _decimal(extended["size"], name, filename)
        extended = {}
        num_members += 1
        if num_members > MAX_MEMBERS:
            raise InvalidModelFiles(f"{filename} has more than {MAX_MEMBERS} members; tar only the files of the model.")
        _reject_kind(kind, name, filename)
        if kind in b"0\0" and name.endswith("/"):  # how very old archives mark folders
            kind = _FOLDER
        if kind == _FOLDER:
            size = 0
        if offset + size > num_bytes:
            raise InvalidModelFiles(
                f"{filename} is truncated: it ends before the {size} bytes of {name[:200]!r}; upload it again."
            )
        yield name, kind, offset, size
        offset += _padded(size)


def _reject_kind(kind: bytes, name: str, filename: str) -> None:
    if kind in _FILE or kind == _FOLDER:
        return
    if kind in _LINKS:
        what = "is a link; tar the files themselves (tar --dereference --hard-dereference)"
    elif kind in _DEVICES:
        what = "is a device or another special file; tar only the files of the model"
    elif kind == _SPARSE:
        what = "is a sparse file; tar it without --sparse"
    else:
        what = f"is of the unknown type {kind!r}; tar the files with tar --format=pax"
    raise InvalidModelFiles(f"{filename} contains {name[:200]!r}, which {what}.")


def _extension(kind: bytes, content: bytes, filename: str) -> dict[str, str]:
    """The properties of the next member in an extended header."""
    if kind == _LONG_LINK:
        return {}  # the next member is a link, which is rejected
    if kind == _LONG_NAME:
        return {"path": _decoded(content.rstrip(b"\0"), filename)}
    found: dict[str, str] = {}
    while content:
        length, separator, _rest = content[:20].partition(b" ")
        number = int(length) if length.isdigit() else 0
        record = content[:number]
        if not separator or number <= len(length) + 1 or len(record) != number or not record.endswith(b"\n"):
            raise InvalidModelFiles(f"{filename} has a malformed pax header; tar the model's files again.")
        content = content[number:]
        key, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if key.startswith(b"GNU.sparse."):
            raise InvalidModelFiles(
                f"{filename} contains a sparse file ({key[:60].decode('ascii', 'replace')}); tar it without --sparse."
            )
        if equals and key in (b"path", b"size"):
            if kind == _PAX_GLOBAL:
                raise InvalidModelFiles(
                    f"{filename} sets the same {key.decode()} for all members; tar the files again."
                )
            found[key.decode()] = _decoded(value, filename)
    return found


class _Names:
    """The names seen so far; no two of them may mean the same file."""

    def __init__(self, filename: str) -> None:
        self._filename = filename
        self._folders: set[str] = set()
        self._files: set[str] = set()

    def add(self, name: str, *, is_folder: bool) -> str | None:
        """The member's path, without ``./``; ``None`` for the root. Raises `InvalidModelFiles`."""
        path = PurePosixPath(name)
        fault = _fault_in(name, path)
        if fault is not None:
            raise InvalidModelFiles(f"{self._filename} contains {name[:200]!r}, which {fault}.")
        if not path.parts:
            if is_folder:
                return None
            raise InvalidModelFiles(f"{self._filename} contains a file without a name; tar the files again.")
        # Equal for names that are the same on a file system that ignores case or normalizes Unicode.
        key = unicodedata.normalize("NFC", str(path)).casefold()
        parents = {str(parent) for parent in PurePosixPath(key).parents} - {"."}
        if key in self._files or (not is_folder and key in self._folders) or parents & self._files:
            raise InvalidModelFiles(
                f"{self._filename} contains {name[:200]!r} twice, or with names that differ only in case; keep one."
            )
        self._folders |= parents
        (self._folders if is_folder else self._files).add(key)
        return str(path)


def _fault_in(name: str, path: PurePosixPath) -> str | None:
    if path.is_absolute() or ".." in path.parts:
        return "is outside the folder that it is unpacked to; tar the model's directory from inside it"
    if "\\" in name or (path.parts and ":" in path.parts[0]) or not name.isprintable():
        return "has a backslash, a colon or a control character in its name; rename it"
    if len(name.encode("utf-8")) > MAX_NAME_BYTES or any(len(part.encode()) > MAX_PART_BYTES for part in path.parts):
        return f"has a name longer than {MAX_PART_BYTES} bytes; rename it"
    return None


# --- Fields of a header -----------------------------------------------------------------------------------------------


def _check_sum(header: bytes, offset: int, filename: str) -> None:
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if header[257:262] != b"ustar" or _number(header[148:156], "checksum", filename) != total:
        raise InvalidModelFiles(
            f"{filename} is not a readable .tar: there is no valid header at byte {offset}. Create it with tar, "
            "without compression."
        )


def _number(field: bytes, what: str, filename: str) -> int:
    """A number in octal digits, or in GNU tar's base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if not all(digit in b"01234567" for digit in digits):
        raise InvalidModelFiles(f"{filename} is not a readable .tar: a member's {what} is {field!r}.")
    return int(digits, 8)


def _decimal(text: str, name: str, filename: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InvalidModelFiles(f"{filename} gives {name[:200]!r} the size {text[:40]!r}; tar the files again.")
    return int(text)


def _ustar_name(header: bytes, filename: str) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = b"" if header[257:265] == b"ustar  \0" else header[345:500].partition(b"\0")[0]  # GNU has none
    return _decoded(prefix + b"/" + name if prefix else name, filename)


def _decoded(name: bytes, filename: str) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidModelFiles(
            f"{filename} contains {name[:200]!r}, a name that is not UTF-8; rename the file."
        ) from None


def _content(file: BinaryIO, offset: int, size: int, num_bytes: int, filename: str) -> bytes:
    if offset + size > num_bytes:
        raise InvalidModelFiles(f"{filename} is truncated: it ends inside a header; upload it again.")
    file.seek(offset)
    return file.read(size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
