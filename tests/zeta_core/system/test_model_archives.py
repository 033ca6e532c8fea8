"""Archives and folders of models: links, names, sizes and formats."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.harness.model_archives import CONFIG, safetensors_file
from tests.harness.model_checks import check_upload, rejection
from zeta_core.system.model_files import ArchiveFiles, FolderFiles, InvalidModelFiles, check_archive
from zeta_core.system.model_files.archive import BLOCK, MAX_EXTENSION_BYTES


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **changes: Any) -> bytes:
    """One header of a tar, as `tarfile` writes it."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for field, value in changes.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(record: bytes, kind: bytes = b"x") -> bytes:
    return entry("pax", kind, len(record)) + record + b"\0" * (-len(record) % BLOCK)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d " % length) + len(key) + len(value) + 2 != length:
        length = len(b"%d " % length) + len(key) + len(value) + 2
    return b"%d %s=%s\n" % (length, key, value)


LINKS: list[tuple[bytes, str]] = [
    (tarfile.SYMTYPE, "is a link"),
    (tarfile.LNKTYPE, "is a link"),
    (tarfile.CHRTYPE, "is a device"),
    (tarfile.BLKTYPE, "is a device"),
    (tarfile.FIFOTYPE, "is a device"),
    (b"S", "is a sparse file"),
    (b"D", "is of the unknown type"),
    (b"Z", "is of the unknown type"),
]


def rejected_archive(tmp_path: Path, content: bytes) -> str:
    (tmp_path / "model.tar").write_bytes(content)
    with pytest.raises(InvalidModelFiles) as raised:
        check_archive(tmp_path / "model.tar", "model.tar")
    return raised.value.message


@pytest.mark.parametrize(("kind", "expected"), LINKS)
def test_members_that_are_not_plain_files_are_rejected(tmp_path: Path, kind: bytes, expected: str) -> None:
    message = rejected_archive(tmp_path, entry("vocab.txt", kind, linkname="/etc/passwd"))
    assert message.startswith("model.tar contains 'vocab.txt', which ")
    assert expected in message


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x.json",
        "a/../../x.json",
        "a\\..\\x.json",
        "C:/x.json",
        "a\nb.json",
        "x" * 300 + ".json",
        "abcdefgh/" * 200 + "x",
    ],
)
def test_member_names_that_are_unsafe_are_rejected(tmp_path: Path, name: str) -> None:
    assert f"model.tar contains {name[:200]!r}, which " in rejected_archive(tmp_path, entry(name))


def test_a_member_name_with_a_null_byte_is_rejected(tmp_path: Path) -> None:
    assert "control character" in rejected_archive(tmp_path, pax(record(b"path", b"config.json\0.txt")) + entry("a"))


@pytest.mark.parametrize(
    "names",
    [
        ("config.json", "config.json"),
        ("config.json", "./config.json"),
        ("config.json", "CONFIG.json"),
        ("caf\u00e9.json", "cafe\u0301.json"),
        ("a", "a/b.json"),
        ("a/b.json", "a"),
        ("a//b.json", "a/b.json"),
    ],
)
def test_two_members_for_one_file_are_rejected(tmp_path: Path, names: tuple[str, str]) -> None:
    message = rejected_archive(tmp_path, b"".join(entry(name) for name in names))
    assert "twice, or with names that differ only in case" in message


@pytest.mark.parametrize("key", [b"GNU.sparse.major", b"GNU.sparse.map", b"GNU.sparse.realsize", b"GNU.sparse.name"])
def test_a_sparse_file_in_a_pax_header_is_rejected(tmp_path: Path, key: bytes) -> None:
    assert "sparse file" in rejected_archive(tmp_path, pax(record(key, b"1")) + entry("a.json"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (pax(b"x" * MAX_EXTENSION_BYTES + b"y"), "has an extended header of 65537 bytes"),
        (entry("long", b"L", 1 << 33), "has an extended header of 8589934592 bytes"),
        (entry("long", b"K", 1 << 33), "has an extended header of 8589934592 bytes"),
        (entry("g", b"g", 1 << 33), "has an extended header of 8589934592 bytes"),
        (pax(b"999999 path=x\n"), "malformed pax header"),
        (pax(b"0 path=x\n"), "malformed pax header"),
        (pax(b"-5 path=x\n"), "malformed pax header"),
        (pax(b"x" * 1000), "malformed pax header"),
        (pax(record(b"path", b"x"), b"g"), "sets the same path for all members"),
        (pax(record(b"size", b"9" * 30)) + entry("a"), "the size '999999999999999999999999999999'"),
        (pax(record(b"size", b"-1")) + entry("a"), "the size '-1'"),
        (pax(record(b"size", b"1000000")) + entry("a"), "is truncated: it ends before the 1000000 bytes of 'a'"),
        (entry("a", size=1 << 40), "is truncated: it ends before the 1099511627776 bytes of 'a'"),
        (entry("a", b"L", 100), "is truncated: it ends inside a header"),
        (pax(record(b"path", b"\xff\xfe")) + entry("a"), "a name that is not UTF-8"),
        (b"x" * 512, "is not a readable .tar"),
        (entry("a")[:148] + b"0000000\0" + entry("a")[156:], "is not a readable .tar"),
        (b"".join(entry(f"{number}.txt") for number in range(20_001)), "has more than 20000 members"),
    ],
)
def test_malformed_or_truncated_archives_are_rejected(tmp_path: Path, content: bytes, expected: str) -> None:
    assert expected in rejected_archive(tmp_path, content)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_is_read(tmp_path: Path, kind: int) -> None:
    names = ["config.json", f"{'d' * 60}/{'f' * 90}.txt", "x.txt"]
    if kind != tarfile.USTAR_FORMAT:
        names.append(f"{'g' * 120}/é{'h' * 120}.txt")
        names.append(f"x{'é' * 60}.txt")  # the header's 100 bytes end within a character
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=kind) as archive:
        folder = tarfile.TarInfo("d" * 60)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in names:
            info = tarfile.TarInfo(f"./{name}" if name == "x.txt" else name)
            info.size = 2
            info.mtime = 1.5 if kind == tarfile.PAX_FORMAT else 1
            archive.addfile(info, io.BytesIO(b"{}"))
    (tmp_path / "model.tar").write_bytes(made.getvalue())
    files = ArchiveFiles(tmp_path / "model.tar", "model.tar")
    assert dict(files.sizes) == dict.fromkeys(names, 2)
    for name in names:
        with files.open(name) as stream:
            assert stream.read() == b"{}"


@pytest.mark.parametrize("link", ["/etc/passwd", "../secret", "missing/../../secret"])
def test_a_link_that_leaves_its_folder_is_rejected(tmp_path: Path, link: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "inside.txt").symlink_to("config.json")
    assert set(FolderFiles(folder, "model").sizes) == {"config.json", "inside.txt"}
    (folder / "vocab.txt").symlink_to(link)
    with pytest.raises(InvalidModelFiles, match=r"model contains 'vocab.txt', a link to a file outside"):
        FolderFiles(folder, "model")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights/model.PT", "consolidated.00.pth"])
def test_a_model_with_only_pickled_weights_is_rejected(tmp_path: Path, name: str) -> None:
    files: dict[str, object] = {"config.json": CONFIG, name: b"\x80\x04."}
    assert f"{name} is not safetensors" in rejection(tmp_path, files)
    check_upload(tmp_path, {**files, "model.safetensors": safetensors_file()})


@pytest.mark.parametrize(
    "files", [{}, {"notes.txt": "hello"}, {"data.json": {"a": 1}, "model.safetensors": safetensors_file()}]
)
def test_an_archive_without_a_model_or_tokenizer_is_rejected(tmp_path: Path, files: dict[str, object]) -> None:
    assert "contains no config.json" in rejection(tmp_path, files)
