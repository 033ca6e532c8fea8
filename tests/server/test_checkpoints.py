"""Checkpoints over HTTP: lists, manifests, files, ranges and archives."""

import hashlib
import io
import tarfile
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest

from tests.server.rows import CREATED_AT, Rows, some_bytes
from tests.server.server_process import API_KEY, ServerProcess, error_of
from zeta_core.contract.job.checkpoint import FileRole
from zeta_core.contract.job.status import JobStatus

WEIGHTS = some_bytes(3_000_000, seed=1)  # three chunks of a download
FILES: dict[str, tuple[FileRole, bytes]] = {
    "model.safetensors": ("weights", WEIGHTS),
    "config.json": ("config", b'{"model_type": "llama"}'),
    "tokenizer/with space & é.txt": ("tokenizer", "é".encode() * 700),
    "training_state/optimizer.bin": ("state", some_bytes(5000, seed=2)),
    "a/" + "long" * 40 + "/name.txt": ("tokenizer", b""),
}


@dataclass(frozen=True)
class StoredCheckpoints:
    """A job with the checkpoints ``step-5`` and ``final``, and the bytes of the latter by path."""

    job_id: str
    files: dict[str, bytes]

    @property
    def path(self) -> str:
        return f"/v1/jobs/{self.job_id}/checkpoints"


@pytest.fixture(scope="module")
def stored(rows: Rows) -> StoredCheckpoints:
    job_id = rows.job()
    rows.attempt(job_id, to=JobStatus.SUCCEEDED)
    rows.checkpoint(job_id, "step-5", 5, {"model.safetensors": ("weights", b"five")})
    rows.checkpoint(job_id, "step-10", 10, FILES)
    return StoredCheckpoints(job_id, rows.checkpoint(job_id, "final", 10, FILES))


def test_checkpoints_are_listed_newest_first_and_counted(stored: StoredCheckpoints, http: httpx.Client) -> None:
    page = http.get(stored.path).json()
    assert [checkpoint["name"] for checkpoint in page["data"]] == ["step-10", "final", "step-5"]
    first = http.get(f"{stored.path}?limit=1").json()
    assert (first["has_more"], first["last_id"]) == (True, "step-10")
    rest = http.get(f"{stored.path}?after=step-10").json()
    assert [checkpoint["name"] for checkpoint in rest["data"]] == ["final", "step-5"]
    job = http.get(f"/v1/jobs/{stored.job_id}").json()
    assert (job["checkpoints"], job["final_checkpoint"]) == (3, "final")


@pytest.mark.parametrize("name", ["latest", "final", "step-3"])
def test_a_job_without_checkpoints_is_named_with_the_next_command(rows: Rows, http: httpx.Client, name: str) -> None:
    queued, failed = rows.job(), rows.job()
    rows.attempt(failed, to=JobStatus.FAILED)
    for job_id, sentence in (
        (queued, f"Job {queued} is queued and has no checkpoint yet; `zeta wait {queued}` waits until it has ended."),
        (
            failed,
            f"Job {failed} ended (failed) before it saved a checkpoint; start it again with `zeta rerun {failed}`.",
        ),
    ):
        response = http.get(f"/v1/jobs/{job_id}/checkpoints/{name}")
        assert (response.status_code, error_of(response)["message"]) == (404, sentence)


def test_a_manifest_lists_each_file_with_size_hash_and_role(stored: StoredCheckpoints, http: httpx.Client) -> None:
    manifest = http.get(f"{stored.path}/final").json()
    assert (manifest["name"], manifest["step"], manifest["format"]) == ("final", 10, "huggingface")
    assert {file["path"]: (file["size"], file["sha256"], file["role"]) for file in manifest["files"]} == {
        path: (len(content), hashlib.sha256(content).hexdigest(), role) for path, (role, content) in FILES.items()
    }
    assert http.get(f"{stored.path}/latest").json()["step"] == 10


@pytest.mark.parametrize("name", ["best", "step-7", "step-", "FINAL", "..", "%2e%2e", "..%2ffinal", "final%00", "."])
def test_an_unknown_checkpoint_is_not_found(server: ServerProcess, stored: StoredCheckpoints, name: str) -> None:
    for rest in ("", "/archive", "/files/config.json"):
        assert get_raw_path(server, f"{stored.path}/{name}{rest}")[0] == 404


def get_raw_path(server: ServerProcess, path: str) -> tuple[int, bytes]:
    """GET a path unchanged (`httpx` would resolve the dots)."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", path, headers={"Authorization": f"Bearer {API_KEY}"})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content


# --- Files ------------------------------------------------------------------------------------------------------------


def test_every_downloaded_file_matches_its_manifest(stored: StoredCheckpoints, http: httpx.Client) -> None:
    for path, content in stored.files.items():
        response = http.get(f"{stored.path}/final/files/{path}")
        assert response.content == content
        assert response.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
        assert response.headers["content-length"] == str(len(content))
        assert response.headers["accept-ranges"] == "bytes"
        head = http.head(f"{stored.path}/final/files/{path}")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(content))


@pytest.mark.parametrize(
    "path",
    [
        "../step-5/model.safetensors",
        "%2e%2e/step-5/model.safetensors",
        "..%2fstep-5%2fmodel.safetensors",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "",
        "training_state",
        "config.json%00",
        "./config.json",
        "tokenizer/../config.json",
    ],
)
def test_only_files_of_the_manifest_are_served(server: ServerProcess, stored: StoredCheckpoints, path: str) -> None:
    status, content = get_raw_path(server, f"{stored.path}/final/files/{path}")
    assert status == 404
    assert b"not_found_error" in content


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, None),
        ("bytes=1000-1999", 1000, 2000),
        ("bytes=1048570-1048590", 1048570, 1048591),
        ("bytes=2999999-", 2999999, None),
        ("bytes=2999990-9999999", 2999990, None),
        ("bytes=-1", 2999999, None),
        ("bytes=-5000000", 0, None),
    ],
)
def test_a_range_returns_exactly_its_bytes(
    stored: StoredCheckpoints, http: httpx.Client, wanted: str, start: int, end: int | None
) -> None:
    response = http.get(f"{stored.path}/final/files/model.safetensors", headers={"Range": wanted})
    assert response.status_code == 206
    assert response.content == WEIGHTS[start:end]
    last = (len(WEIGHTS) if end is None else end) - 1
    assert response.headers["content-range"] == f"bytes {start}-{last}/{len(WEIGHTS)}"
    assert response.headers["content-length"] == str(last - start + 1)


@pytest.mark.parametrize("wanted", ["bytes=3000000-", "bytes=9999999-", "bytes=-0", f"bytes={'9' * 18}-"])
def test_a_range_beyond_the_end_returns_416_with_the_length(
    stored: StoredCheckpoints, http: httpx.Client, wanted: str
) -> None:
    response = http.get(f"{stored.path}/final/files/model.safetensors", headers={"Range": wanted})
    assert (response.status_code, error_of(response)["code"]) == (416, "range_not_satisfiable")
    assert response.headers["content-range"] == "bytes */3000000"


@pytest.mark.parametrize("wanted", ["bytes=5-4", "bytes=0-1,5-6", "lines=1-2", "bytes=", "bytes=-", "bytes=a-b"])
def test_an_invalid_range_is_ignored(stored: StoredCheckpoints, http: httpx.Client, wanted: str) -> None:
    response = http.get(f"{stored.path}/final/files/config.json", headers={"Range": wanted})
    assert (response.status_code, response.content) == (200, FILES["config.json"][1])


def test_if_range_and_if_none_match_compare_the_etag(stored: StoredCheckpoints, http: httpx.Client) -> None:
    path = f"{stored.path}/final/files/config.json"
    etag = http.get(path).headers["etag"]
    some = {"Range": "bytes=0-1"}
    assert http.get(path, headers={**some, "If-Range": etag}).status_code == 206
    assert http.get(path, headers={**some, "If-Range": '"other"'}).status_code == 200
    assert http.get(path, headers={**some, "If-Range": "Sun, 22 Nov 2026 10:00:00 GMT"}).status_code == 200
    for header in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        response = http.get(path, headers={"If-None-Match": header})
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", etag)
    assert http.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_an_interrupted_download_resumes_to_the_same_bytes(stored: StoredCheckpoints, http: httpx.Client) -> None:
    path = f"{stored.path}/final/files/model.safetensors"
    etag = http.head(path).headers["etag"]
    received = b""
    while len(received) < len(WEIGHTS):
        headers = {"Range": f"bytes={len(received)}-", "If-Range": etag} if received else {}
        with http.stream("GET", path, headers=headers) as response:
            assert response.status_code == (206 if received else 200)
            cut = len(received) + 700_001
            for chunk in response.iter_raw():
                received += chunk
                if len(received) >= cut:
                    break
    assert received == WEIGHTS


# --- Archives ---------------------------------------------------------------------------------------------------------


def members(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {member.name: _content(archive, member) for member in archive.getmembers()}


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    assert (member.mtime, member.mode, member.uid, member.isfile()) == (CREATED_AT.timestamp(), 0o644, 0, True)
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def test_an_archive_omits_the_training_state_by_default(stored: StoredCheckpoints, http: httpx.Client) -> None:
    response = http.get(f"{stored.path}/final/archive")
    assert response.headers["content-type"] == "application/x-tar"
    assert response.headers["content-length"] == str(len(response.content))
    assert len(response.content) % 512 == 0
    wanted = {path: content for path, content in stored.files.items() if not path.startswith("training_state/")}
    assert members(response.content) == wanted
    assert list(members(response.content))[-1] == "manifest.json"
    with_state = http.get(f"{stored.path}/final/archive?state=true")
    assert members(with_state.content) == stored.files
    assert with_state.headers["etag"] != response.headers["etag"]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ({"include": "*.json"}, ["config.json", "manifest.json"]),
        ({"include": "model*"}, ["model.safetensors"]),
        ({"include": "tokenizer/*"}, ["tokenizer/with space & é.txt"]),
        ({"include": "training_state/*", "state": "true"}, ["training_state/optimizer.bin"]),
    ],
)
def test_a_glob_selects_the_files_of_an_archive(
    stored: StoredCheckpoints, http: httpx.Client, query: dict[str, str], names: list[str]
) -> None:
    response = http.get(f"{stored.path}/final/archive", params=query)
    assert list(members(response.content)) == names


@pytest.mark.parametrize("query", [{"include": "*.bin"}, {"include": "nothing"}, {"include": "["}])
def test_a_glob_without_matches_is_reported(
    stored: StoredCheckpoints, http: httpx.Client, query: dict[str, str]
) -> None:
    response = http.get(f"{stored.path}/final/archive", params=query)
    assert (response.status_code, error_of(response)["code"]) == (404, "nothing_included")


def test_an_archive_is_reproducible_and_supports_ranges(stored: StoredCheckpoints, http: httpx.Client) -> None:
    path = f"{stored.path}/final/archive?state=true"
    whole = http.get(path)
    again = http.get(path)
    assert whole.content == again.content
    assert whole.headers["etag"] == again.headers["etag"]
    assert http.head(path).headers["content-length"] == str(len(whole.content))
    for start, end in ((0, 1), (500, 1600), (511, 513), (3_000_000, 3_010_000), (len(whole.content) - 1025, None)):
        wanted = f"bytes={start}-{'' if end is None else end - 1}"
        part: Any = http.get(path, headers={"Range": wanted, "If-Range": whole.headers["etag"]})
        assert (part.status_code, part.content) == (206, whole.content[start:end])


def test_a_damaged_manifest_is_reported_and_a_truncated_file_ends_the_download(rows: Rows, http: httpx.Client) -> None:
    job_id = rows.job()
    rows.checkpoint(job_id, "final", 1, FILES)
    directory = rows.settings.artifacts / "jobs" / job_id / "checkpoints" / "final"
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(1_500_000)
    with pytest.raises(httpx.RemoteProtocolError):
        http.get(f"/v1/jobs/{job_id}/checkpoints/final/files/model.safetensors")
    (directory / "manifest.json").write_text("{")
    response = http.get(f"/v1/jobs/{job_id}/checkpoints/final")
    assert (response.status_code, error_of(response)["type"]) == (503, "unavailable_error")
