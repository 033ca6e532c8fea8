"""The exact bytes that an upload sends, and the local files that it rejects."""

import json
import os
import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from email.parser import BytesParser
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest

from zeta.client import Client
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.responses import StoredFile


class Receiver(HTTPServer):
    """Responds like the service, and records the parts of the last form (headers, content) and the file name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.parts: list[tuple[dict[str, str], bytes]] = []
        self.name = ""

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that closes the connection


class _Handler(BaseHTTPRequestHandler):
    server: Receiver  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self._answer({"object": "list", "data": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        message = BytesParser().parsebytes(head + body)
        parts: Any = message.get_payload()
        (encoded,) = re.findall(rb"; filename\*=UTF-8''([^;\r]+)\r\n", body)
        self.server.name = unquote(encoded.decode("ascii"))
        self.server.parts = [(dict(part.items()), part.get_payload(decode=True)) for part in parts]
        content = self.server.parts[1][1]
        stored = StoredFile(
            id=new_id("file"),
            filename="stored.txt",
            bytes=len(content),
            sha256=sha256(content).hexdigest(),
            purpose="dataset",
            created_at=datetime.now(UTC),
        )
        self._answer(stored.model_dump(mode="json"))

    def _answer(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("X-Request-Id", "req_1")  # by which a client recognizes the service
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def sender(receiver: Receiver) -> Iterator[Client]:
    with Client(f"http://127.0.0.1:{receiver.server_port}", "key") as client:
        yield client


@pytest.mark.parametrize(
    "name",
    ["plain.txt", 'quo"te.txt', "back\\slash.txt", "per%22cent.txt", "データ\u30001.txt", "no\u00a0break.txt",
     "👨\u200d👩\u200d👧.txt", "semi;colon=1.txt", "line\nbreak\r.txt", "it's.txt", "x" * 240 + ".txt"],
)  # fmt: skip
def test_a_file_name_is_sent_exactly(name: str, receiver: Receiver, sender: Client, tmp_path: Path) -> None:
    content = b"--boundary\r\n\x00\xff some bytes\r\n"
    (tmp_path / name).write_bytes(content)
    sender.upload(tmp_path / name)
    (purpose, purpose_value), (_, received) = receiver.parts
    assert purpose == {"Content-Disposition": 'form-data; name="purpose"'}
    assert purpose_value == b"dataset"
    assert received == content
    assert receiver.name == name


def test_a_file_name_that_is_not_utf8_gets_replacement_characters(
    receiver: Receiver, sender: Client, tmp_path: Path
) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9 \xa4.txt")
    path.write_text("x")
    sender.upload(path)
    assert receiver.name == "caf\ufffd \ufffd.txt"


def test_only_regular_files_are_uploaded(sender: Client, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.txt"))
        (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
        for path, expected in (
            (tmp_path / "pipe.txt", "is a named pipe; name a regular file"),
            (tmp_path / "socket.txt", "is a socket; name a regular file"),
            (tmp_path, "is a folder; name a regular file"),
            (Path("/dev/null"), "is a device; name a regular file"),
            (tmp_path / "gone.txt", "cannot be read: No such file"),
            (tmp_path / "nul\0.txt", "is not a valid path"),
            (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        ):
            with pytest.raises(InvalidRequest, match=expected):
                sender.upload(path)


@pytest.mark.parametrize("change", [b"", b"longer than before, by far"])
def test_a_file_that_changes_during_the_upload_is_reported(change: bytes, sender: Client, tmp_path: Path) -> None:
    path = tmp_path / "growing.bin"
    path.write_bytes(b"x" * (3 << 20))

    def on_bytes(done: int, total: int) -> None:
        if done == 1 << 20:
            path.write_bytes(b"y" * (1 << 20) + change * (1 << 17) if change else b"")

    with pytest.raises(InvalidRequest, match=r"growing\.bin changed while it was uploaded"):
        sender.upload(path, on_bytes=on_bytes)
