"""Uploaded files are streamed in both directions, rejected early where possible, and deleted completely."""

import hashlib
import io
import itertools
import json
import resource
import signal
import socket
import tarfile
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.waiting import wait_until
from tests.server.rows import some_bytes
from tests.server.server_process import API_KEY, SPEC, ServerProcess, error_of, running_server
from zeta_core.contract.job.responses import StoredFile

TEXT = b"To be, or not to be.\n" * 1000


def upload(http: httpx.Client, name: str = "a.txt", content: bytes = TEXT, purpose: str = "dataset") -> httpx.Response:
    return http.post("/v1/files", files={"file": (name, content)}, data={"purpose": purpose})


def unfinished_uploads(server: ServerProcess) -> list[Path]:
    return list((server.settings.artifacts / "incoming").iterdir())


def model_archive() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        entry = tarfile.TarInfo("config.json")
        entry.size = 2
        archive.addfile(entry, io.BytesIO(b"{}"))
    return made.getvalue()


def test_a_file_is_stored_described_listed_and_served(server: ServerProcess, http: httpx.Client) -> None:
    response = upload(http)
    file = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == f"/v1/files/{file['id']}"
    StoredFile.model_validate(file)
    digest = hashlib.sha256(TEXT).hexdigest()
    assert (file["object"], file["filename"], file["bytes"], file["sha256"], file["purpose"]) == (
        ("file", "a.txt", len(TEXT), digest, "dataset")
    )
    assert http.get(f"/v1/files/{file['id']}").json() == file
    assert file["id"] in [stored["id"] for stored in http.get(f"/v1/files?sha256={digest}").json()["data"]]
    assert http.get("/v1/files?sha256=0").json()["data"] == []
    content = http.get(f"/v1/files/{file['id']}/content")
    assert (content.content, content.headers["etag"]) == (TEXT, f'"{digest}"')
    part = http.get(f"/v1/files/{file['id']}/content", headers={"Range": "bytes=-5"})
    assert (part.status_code, part.content) == (206, TEXT[-5:])
    assert unfinished_uploads(server) == []
    spec = {**SPEC, "dataset": {"file": file["id"]}}
    resolved = http.post("/v1/jobs", json=spec).json()["resolved_spec"]
    assert resolved["files"] == {
        file["id"]: {"filename": "a.txt", "sha256": digest, "purpose": "dataset", "bytes": len(TEXT)}
    }


@pytest.mark.parametrize("num_bytes", [1, 65535, 65536, 65537, 4 << 20, (4 << 20) + 1, 9_000_001])
def test_bytes_that_look_like_boundaries_are_stored_unchanged(http: httpx.Client, num_bytes: int) -> None:
    content = (b"\r\n--\r\n-" + some_bytes(1000, seed=3).replace(b"\0", b"\r") + b"\r\r\n\n") * (num_bytes // 1000 + 1)
    content = content[:num_bytes]
    file = upload(http, content=content).json()
    assert (file["bytes"], file["sha256"]) == (num_bytes, hashlib.sha256(content).hexdigest())


def test_parts_may_come_in_any_order_and_chunk_size(server: ServerProcess) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.txt"\r\nContent-Type: text/plain\r\n\r\n'
        b'words\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\ndataset\r\n--b--\r\n'
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    with server.http() as http:
        for size in (1, 7, len(body)):
            pieces = (body[start : start + size] for start in range(0, len(body), size))
            response = http.post("/v1/files", content=pieces, headers=headers)
            assert (response.status_code, response.json()["bytes"]) == (201, 5)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("../../etc/a.txt", "a.txt"),
        ("C:\\data\\a.TXT", "a.TXT"),
        ("日本 é.txt", "日本 é.txt"),
        ("a\tb.txt", "a%09b.txt"),
    ],
)
def test_directories_are_removed_from_file_names(http: httpx.Client, name: str, stored: str) -> None:
    file = upload(http, name=name).json()
    assert file["filename"] == stored
    content = http.get(f"/v1/files/{file['id']}/content")
    assert content.content == TEXT


@pytest.mark.parametrize(
    ("name", "content", "purpose", "code"),
    [
        ("a.txt", b"", "dataset", "empty_file"),
        ("a.exe", TEXT, "dataset", "unknown_format"),
        ("a", TEXT, "dataset", "unknown_format"),
        ("a.tar", model_archive(), "dataset", "unknown_format"),
        ("a.txt", b"MZ\0\0" + TEXT, "dataset", "unknown_format"),
        ("a.parquet", TEXT, "dataset", "unknown_format"),
        ("a.arrow", TEXT, "dataset", "unknown_format"),
        ("a.npy", TEXT, "dataset", "unknown_format"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "dataset", "unknown_format"),
        ("a.txt", "text".encode("utf-16-le"), "dataset", "unknown_format"),
        ("a.jsonl.gz", TEXT, "dataset", "unknown_format"),
        ("a.parquet.gz", b"\x1f\x8b" + TEXT, "dataset", "unknown_format"),
        ("a.txt", TEXT, "model", "unknown_format"),
        ("a.tar", TEXT, "model", "unknown_format"),
    ],
)
def test_unknown_formats_and_empty_files_are_rejected(
    server: ServerProcess, http: httpx.Client, name: str, content: bytes, purpose: str, code: str
) -> None:
    response = upload(http, name, content, purpose)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (422, code, "file")
    assert name in error["message"]
    assert unfinished_uploads(server) == []


@pytest.mark.parametrize(
    ("name", "content", "as_text", "as_tokens"),
    [
        ("a.md", TEXT, True, False),
        ("a.jsonl", b'{"text": "x"}\n', True, True),
        ("a.JSON", b'[{"text": "x"}]', True, True),
        ("a.csv", b"text\nx\n", True, True),
        ("a.jsonl.gz", b"\x1f\x8b" + TEXT, True, True),
        ("a.txt.zst", b"\x28\xb5\x2f\xfd" + TEXT, True, False),
        ("a.parquet", b"PAR1" + TEXT, True, True),
        ("a.arrow", b"ARROW1\0\0" + TEXT, True, True),
        ("a.npy", b"\x93NUMPY" + TEXT, False, True),
        ("a.bin", b"\0\1\0\2", False, True),
    ],
)
def test_known_formats_are_stored_and_unreadable_ones_fail_the_job(
    http: httpx.Client, name: str, content: bytes, as_text: bool, as_tokens: bool
) -> None:
    dataset = {"file": upload(http, name, content).json()["id"]}
    specs = ({"dataset": dataset}, {"dataset": {**dataset, "format": "tokens"}})
    responses = [http.post("/v1/jobs", json={**SPEC, **fields}) for fields in specs]
    assert [response.status_code == 201 for response in responses] == [as_text, as_tokens], [
        response.text for response in responses
    ]
    for response in responses:
        if response.status_code != 201:
            error = error_of(response)
            assert (response.status_code, error["param"], error["code"]) == (422, "dataset.file", "unknown_format")


def test_a_model_is_a_tar_and_not_a_dataset(http: httpx.Client) -> None:
    file = upload(http, "model.tar", model_archive(), "model").json()
    assert http.post("/v1/jobs", json={**SPEC, "model": {"file": file["id"]}}).status_code == 201
    response = http.post("/v1/jobs", json={**SPEC, "dataset": {"file": file["id"]}})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (422, "dataset.file", "wrong_purpose")


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    named = f'; filename="{filename}"' if filename else ""
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content + b"\r\n"


FILE, PURPOSE, END = part("file", b"words", "a.txt"), part("purpose", b"dataset"), b"--b--\r\n"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (PURPOSE + END, 422, "file"),
        (FILE + END, 422, "purpose"),
        (END, 422, "file"),
        (FILE + part("purpose", b"fine-tune") + END, 422, "purpose"),
        (FILE + FILE + PURPOSE + END, 422, "file"),
        (PURPOSE + PURPOSE + FILE + END, 422, "purpose"),
        (FILE + PURPOSE + part("purposes", b"x") + END, 422, "purposes"),
        (part("file", b"words") + PURPOSE + END, 422, "file"),
        (FILE + PURPOSE, 400, None),
        (FILE[:-10], 400, None),
        (b"", 400, None),
        (b"not multipart at all", 400, None),
        (part("purpose", b"x" * 100_000) + FILE + END, 400, None),
    ],
)
def test_an_invalid_multipart_body_is_rejected_and_removed(
    server: ServerProcess, http: httpx.Client, body: bytes, status: int, param: str | None
) -> None:
    response = http.post("/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (status, param), response.text
    assert unfinished_uploads(server) == []


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("application/json", "invalid_content_type"),
        ("multipart/form-data", "invalid_content_type"),
        ("text/plain; boundary=b", "invalid_content_type"),
        ("", "invalid_content_type"),
        ("multipart/form-data; boundary=" + "b" * 1000, "invalid_multipart"),
    ],
)
def test_a_body_that_is_not_multipart_is_rejected(http: httpx.Client, kind: str, code: str) -> None:
    response = http.post("/v1/files", content=b"{}", headers={"Content-Type": kind})
    assert (response.status_code, error_of(response)["code"]) == (400, code)


def test_a_file_is_deleted_unless_an_unfinished_job_uses_it(server: ServerProcess, http: httpx.Client) -> None:
    file = upload(http).json()
    path = server.settings.artifacts / "files" / file["id"]
    assert path.exists()
    spec = {**SPEC, "dataset": [{"builtin": "python-docs"}, {"file": [file["id"]]}]}
    job = http.post("/v1/jobs", json=spec).json()
    refused = http.delete(f"/v1/files/{file['id']}")
    assert (refused.status_code, error_of(refused)["code"]) == (409, "file_in_use")
    assert job["id"] in refused.json()["error"]["message"]
    http.post(f"/v1/jobs/{job['id']}/cancel")
    response = http.delete(f"/v1/files/{file['id']}")
    assert (response.status_code, response.json()) == (200, {"id": file["id"], "object": "file", "deleted": True})
    assert not path.exists()
    assert http.get(f"/v1/files/{file['id']}").status_code == 404
    assert http.delete(f"/v1/files/{file['id']}").status_code == 404
    assert http.post("/v1/jobs", json=spec).status_code == 422


@pytest.mark.extended
def test_files_above_the_limit_are_rejected_with_or_without_length(tmp_path: Path, redis_url: str) -> None:
    with running_server(tmp_path / "home", redis_url, ZETA_MAX_UPLOAD_BYTES="1000000") as server, server.http() as http:
        assert upload(http, content=b"x" * 1_000_000).status_code == 201
        for content in (b"x" * 1_000_001, b"x" * 5_000_000):
            response = upload(http, content=content)
            assert (response.status_code, error_of(response)["type"]) == (413, "too_large_error")
        pieces: Any = (FILE[:-2], *(b"x" * 65536 for _ in range(100)))
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        response = http.post("/v1/files", content=iter(pieces), headers=headers)
        assert response.status_code == 413
        assert "1000000" in response.json()["error"]["message"]
        assert unfinished_uploads(server) == []


@pytest.mark.extended
def test_a_project_stores_no_more_than_its_quota(redis_url: str, tmp_path: Path) -> None:
    with (
        running_server(tmp_path / "home", redis_url, ZETA_PROJECT_QUOTA_BYTES="300000") as server,
        server.http() as http,
    ):
        first = upload(http, content=b"x" * 200_000)
        assert first.status_code == 201
        announced = upload(http, content=b"x" * 200_000)
        assert (announced.status_code, error_of(announced)["code"]) == (429, "quota_exceeded")
        whole = http.build_request(
            "POST", "/v1/files", files={"file": ("a.txt", b"x" * 200_000)}, data={"purpose": "dataset"}
        )
        headers = {"Content-Type": whole.headers["content-type"]}
        chunked = http.post("/v1/files", content=iter([whole.read()]), headers=headers)
        assert (chunked.status_code, error_of(chunked)["code"]) == (429, "quota_exceeded")
        assert unfinished_uploads(server) == []
        assert http.delete(f"/v1/files/{first.json()['id']}").status_code == 200
        assert upload(http, content=b"x" * 200_000).status_code == 201


def test_an_unauthenticated_upload_is_rejected_unread(server: ServerProcess) -> None:
    """The client sends until the buffers are full; the server reads nothing of the body."""
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: {1 << 30}\r\n"
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n")
        response = connection.recv(65536)
        try:
            while sent < 1 << 30:
                sent += connection.send(b"x" * 65536)
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert response.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in response.lower()
    assert sent < 16 << 20
    assert unfinished_uploads(server) == []


def test_an_aborted_upload_leaves_nothing_behind(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {API_KEY}\r\n"
        head += "Content-Length: 100000\r\n"
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + FILE[:-2])
        wait_until(lambda: unfinished_uploads(server), 10, "the upload to have begun")
    wait_until(lambda: not unfinished_uploads(server), 10, "its temporary file to be gone")
    wait_until(lambda: "POST /v1/files was answered with 400" in server.log(), 10, "its line in the log")


@pytest.mark.extended
def test_unfinished_uploads_of_a_killed_server_are_removed_at_its_next_start(tmp_path: Path, redis_url: str) -> None:
    with running_server(tmp_path / "home", redis_url) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {API_KEY}\r\n"
            head += "Content-Length: 100000\r\n"
            connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + FILE[:-2])
            wait_until(lambda: unfinished_uploads(server), 10, "the upload to have begun")
            server.end(signal.SIGKILL)
        assert len(unfinished_uploads(server)) == 1
        server.start()
        assert unfinished_uploads(server) == []


def test_a_full_disk_fails_an_upload_and_the_next_one_succeeds(tmp_path: Path, redis_url: str) -> None:
    with running_server(tmp_path / "home", redis_url) as server, server.http() as http:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (3 << 20, resource.RLIM_INFINITY))  # no file grows beyond
        response = upload(http, content=b"x" * (9 << 20))
        assert (response.status_code, error_of(response)["code"]) == (503, "disk_full")
        assert unfinished_uploads(server) == []
        assert upload(http).status_code == 201
        folder = tmp_path / "home" / "artifacts" / "incoming"
        folder.rename(folder.with_name("away"))  # like a mount that is missing or read-only
        response = upload(http)
        assert (response.status_code, error_of(response)["code"]) == (503, "storage_unavailable")


@pytest.mark.extended
@pytest.mark.timeout(240)
def test_transferring_two_gibibytes_needs_constant_memory(tmp_path: Path, redis_url: str) -> None:
    """Uses a minimal client, because a full one would need more time than the server."""
    num_blocks, block = 2048, b"All the world's a stage, and all the men and women merely player" * 16384
    num_bytes = num_blocks * len(block)
    head, tail = PURPOSE + part("file", b"", "large.txt")[:-2], b"\r\n" + END
    with running_server(tmp_path / "home", redis_url) as server, server.http() as http:
        assert upload(http).status_code == 201  # what the first upload loads is not the large one's
        before = server.peak_memory_bytes()
        headers = {
            "Authorization": f"Bearer {API_KEY}",
            "Content-Type": "multipart/form-data; boundary=b",
            "Content-Length": str(len(head) + num_bytes + len(tail)),
        }
        connection = HTTPConnection("127.0.0.1", server.port, timeout=120)
        connection.request("POST", "/v1/files", itertools.chain([head], [block] * num_blocks, [tail]), headers)
        response = connection.getresponse()
        file = json.loads(response.read())
        assert (response.status, file["bytes"]) == (201, num_bytes), file
        after_upload = server.peak_memory_bytes()
        connection.request("GET", f"/v1/files/{file['id']}/content", headers=headers | {"Content-Length": "0"})
        download = connection.getresponse()
        assert (download.status, download.length) == (200, num_bytes)
        received = bytearray(len(block))
        for _ in range(num_blocks):
            assert download.readinto(received) == len(block)
            assert received == block
        after = server.peak_memory_bytes()
        connection.close()
        http.delete(f"/v1/files/{file['id']}")
    grown = (after_upload - before, after - before)
    assert max(grown) < 64 << 20, f"the upload took {grown[0] >> 20} MiB more, both {grown[1] >> 20} MiB"
