"""Limits of unfinished uploads, counted as their bytes arrive, over all uploads of a project."""

import contextlib
import socket
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import httpx
import pytest

from tests.harness.disks import SmallDisk, can_mount
from tests.harness.waiting import wait_until
from tests.server.server_process import API_KEY, ServerProcess, error_of, running_server

QUOTA = 20_000_000
CHUNK = b"x" * 250_000
SLACK = 2_000_000  # of uploads that were refused and are being removed
HEAD = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\ndataset\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
)
END = b"\r\n--b--\r\n"


class OpenUpload:
    """A chunked upload that the test sends chunk by chunk."""

    def __init__(self, server: ServerProcess) -> None:
        self._connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        self._send_head()
        self.send(HEAD)

    def _send_head(self) -> None:
        self._connection.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {API_KEY}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )

    def send(self, piece: bytes) -> bool:
        """Whether the server still accepts chunks."""
        try:
            self._connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        except (ConnectionResetError, BrokenPipeError):
            return False
        return True

    def end(self) -> None:
        self.send(END)
        with contextlib.suppress(OSError):
            self._connection.sendall(b"0\r\n\r\n")

    def response(self) -> bytes:
        """The server's response, until it is complete or the connection is closed."""
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while not received.endswith(b"}}") and (piece := self._connection.recv(65536)):
                received += piece
                if b"\r\n\r\n" in received and received.startswith(b"HTTP/1.1 2"):
                    break
        return received

    def is_ended(self) -> bool:
        """Whether the server has responded or closed the connection."""
        self._connection.setblocking(False)
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True
        finally:
            self._connection.settimeout(30)
        return True

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def open_upload(server: ServerProcess) -> Generator[Callable[[], OpenUpload]]:
    opened: list[OpenUpload] = []

    def start() -> OpenUpload:
        opened.append(OpenUpload(server))
        return opened[-1]

    try:
        yield start
    finally:
        for sender in opened:
            sender.close()


def rounds_of_chunks(uploads: list[OpenUpload], num_rounds: int) -> Iterator[list[OpenUpload]]:
    """In each round, every upload that is not refused yet sends one chunk; yields the refused ones after the round."""
    refused: list[OpenUpload] = []
    for _ in range(num_rounds):
        for sender in uploads:
            if sender not in refused and (not sender.send(CHUNK) or sender.is_ended()):
                refused.append(sender)
        yield refused


def incoming_bytes(server: ServerProcess) -> int:
    total = 0
    for path in (server.settings.artifacts / "incoming").iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def upload(http: httpx.Client, content: bytes) -> httpx.Response:
    return http.post("/v1/files", files={"file": ("a.txt", content)}, data={"purpose": "dataset"})


@pytest.mark.extended
def test_open_uploads_of_a_project_share_its_quota(tmp_path: Path, redis_url: str) -> None:
    with (
        running_server(tmp_path / "home", redis_url, ZETA_PROJECT_QUOTA_BYTES=str(QUOTA)) as server,
        server.http() as http,
        open_upload(server) as start,
    ):
        assert upload(http, b"x" * 4_000_000).status_code == 201
        open_uploads = [start() for _ in range(13)]
        for _ in rounds_of_chunks(open_uploads, 40):  # 10 MB of each, 130 MB of all
            assert incoming_bytes(server) <= QUOTA - 4_000_000 + SLACK
        for sender in open_uploads:
            sender.end()
        responses = [sender.response() for sender in open_uploads]
        kept = [response for response in responses if response.startswith(b"HTTP/1.1 201 ")]
        # A client that still sends when the server closes the connection may lose the response.
        assert all(
            b" 429 " in response and b"quota_exceeded" in response
            for response in responses
            if response and response not in kept
        )
        assert len(kept) == 1, "each has 10 MB of a quota of 16 MB"
        wait_until(lambda: incoming_bytes(server) == 0, 10, "the temporary files to be gone")
        assert sum(file["bytes"] for file in http.get("/v1/files").json()["data"]) == 14_000_000
        assert upload(http, b"x" * 5_500_000).status_code == 201
        announced = upload(http, b"x" * 1_000_000)
        assert (announced.status_code, error_of(announced)["code"]) == (429, "quota_exceeded")


@pytest.mark.extended
def test_open_uploads_of_two_servers_share_the_quota(tmp_path: Path, redis_url: str) -> None:
    artifacts = {"ZETA_ARTIFACTS_URL": str(tmp_path / "artifacts"), "ZETA_PROJECT_QUOTA_BYTES": str(QUOTA)}
    with (
        running_server(tmp_path / "one", redis_url, **artifacts) as one,
        running_server(tmp_path / "two", redis_url, f"sqlite:///{tmp_path}/one/zeta.db", **artifacts) as two,
        open_upload(one) as start,
        two.http() as http,
    ):
        sender = start()
        for _ in range(56):
            assert sender.send(CHUNK)
        folder = tmp_path / "artifacts" / "incoming"
        wait_until(lambda: sum(path.stat().st_size for path in folder.iterdir()) >= 8_000_000, 20, "bytes on the disk")
        refused = upload(http, b"x" * 13_000_000)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "quota_exceeded")
        sender.close()
        wait_until(lambda: upload(http, b"x" * 13_000_000).status_code == 201, 20, "the quota to be free again")


@pytest.mark.extended
def test_uploads_leave_the_disk_reserve_free(tmp_path: Path, redis_url: str) -> None:
    if not can_mount():
        pytest.skip("a disk of its own needs root")
    disk = SmallDisk(tmp_path / "disk", 48)
    try:
        reserve = {"ZETA_SERVER_MIN_FREE_BYTES": str(16 << 20)}
        with (
            running_server(disk.directory / "home", redis_url, **reserve) as server,
            server.http() as http,
            open_upload(server) as start,
        ):
            assert http.get("/readyz").json()["parts"]["disk"] == "ok"
            open_uploads = [start() for _ in range(6)]
            for _ in rounds_of_chunks(open_uploads, 48):  # 12 MB of each, 72 MB of all
                pass
            # At most two of them have space.
            wait_until(lambda: sum(sender.is_ended() for sender in open_uploads) >= 4, 30, "four refused uploads")
            for response in [sender.response() for sender in open_uploads if sender.is_ended()]:
                # A client that still sends when the server closes the connection may lose the response.
                assert not response or (b"503" in response.split(b"\r\n")[0] and b"disk_full" in response)
            announced = upload(http, b"x" * (40 << 20))
            assert (announced.status_code, error_of(announced)["code"]) == (503, "disk_full")
            assert "ZETA_SERVER_MIN_FREE_BYTES" in announced.text
            spec = {"model": {"config": {"model_type": "llama"}}, "dataset": {"builtin": "python-docs"}}
            assert http.post("/v1/jobs", json=spec).status_code == 201
            for sender in open_uploads:
                sender.close()
            wait_until(lambda: incoming_bytes(server) == 0, 30, "the temporary files to be gone")
            disk.fill(leave_bytes=4 << 20)  # the database can still be written
            ready = http.get("/readyz").json()
            assert ready["status"] != "ok"
            assert "reserve" in ready["parts"]["disk"]
            disk.free()
            wait_until(lambda: http.get("/readyz").json()["parts"]["disk"] == "ok", 20, "free disk space")
    finally:
        disk.close()


@pytest.mark.extended
@pytest.mark.parametrize(
    ("setting", "sends_on"), [("ZETA_UPLOAD_IDLE_SECONDS", False), ("ZETA_UPLOAD_MAX_SECONDS", True)]
)
def test_stalled_and_slow_uploads_are_ended(tmp_path: Path, redis_url: str, setting: str, sends_on: bool) -> None:
    with running_server(tmp_path / "home", redis_url, **{setting: "1"}) as server, open_upload(server) as start:
        sender = start()

        def has_ended() -> bool:
            if sends_on:
                sender.send(b"x")
            return sender.is_ended()

        wait_until(has_ended, 20, "a response")
        response = sender.response()
        assert response.startswith(b"HTTP/1.1 408 ")
        assert setting.encode() in response
        assert b"upload_timeout" in response
        wait_until(lambda: not list((server.settings.artifacts / "incoming").iterdir()), 10, "the file to be gone")
