"""`ZETA_DOWNLOADS=redirect`: downloads from the object store, with links that expire and without the key."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from pydantic import ValidationError

from server.settings import ServerSettings
from tests.harness.seaweedfs import SeaweedServer
from tests.harness.tcp_relay import TcpRelay
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, ServerProcess, error_of, running_server
from zeta.client import Client
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.run_directory import checkpoint_key
from zeta_core.system.artifact_location import BucketLocation
from zeta_core.system.artifact_store.bucket import BucketStore

WEIGHTS = os.urandom(3_000_000)


@dataclass(frozen=True)
class LinkedService:
    """A server, the relay through which its bucket is reached, and a job with a final checkpoint in it."""

    server: ServerProcess
    relay: TcpRelay
    store: BucketStore
    job_id: str


@pytest.fixture(scope="module")
def linked(
    shared_valkey: ValkeyServer, object_store: SeaweedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LinkedService]:
    home, bucket = tmp_path_factory.mktemp("linked"), object_store.new_bucket()
    relay = TcpRelay(object_store.port)
    variables = {
        **object_store.environment(f"http://127.0.0.1:{relay.port}"),
        "ZETA_ARTIFACTS_URL": f"s3://{bucket}/zeta",
        "ZETA_DOWNLOADS": "redirect",
    }
    try:
        with running_server(home, shared_valkey.second_url, None, **variables) as server:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in object_store.environment().items():
                    patch.setenv(name, value)
                store = BucketStore(home / "test-copies", BucketLocation(bucket, "zeta/"))
                job_id = stored_job(server, store)
            yield LinkedService(server, relay, store, job_id)
    finally:
        relay.close()


def stored_job(server: ServerProcess, store: BucketStore) -> str:
    """A job that has succeeded, with its final checkpoint in the bucket."""
    rows = Rows(server.settings)
    job_id = rows.job()
    rows.attempt(job_id, log="the log", to=JobStatus.SUCCEEDED)
    rows.checkpoint(job_id, "final", 4, {"model.safetensors": ("weights", WEIGHTS), "config": ("config", b"{}")})
    store.open_job(job_id)
    store.put_checkpoint(job_id, "final", server.settings.artifacts / checkpoint_key(job_id, "final"))
    return job_id


def test_a_link_serves_ranges_and_needs_no_key(linked: LinkedService) -> None:
    url = f"/v1/jobs/{linked.job_id}/checkpoints/final/files/model.safetensors"
    with linked.server.http() as http, httpx.Client(verify=False) as other:
        answer = http.get(url)
        assert (answer.status_code, answer.headers["cache-control"]) == (307, "private, no-store")
        link = answer.headers["location"]
        assert "X-Amz-Expires=300" in link
        whole = other.get(link)
        assert whole.content == WEIGHTS
        assert whole.headers["content-disposition"] == "attachment; filename*=UTF-8''model.safetensors"
        part = other.get(link, headers={"Range": "bytes=7-16"})
        assert (part.status_code, part.content) == (206, WEIGHTS[7:17])
        assert other.get(link.replace("X-Amz-Expires=300", "X-Amz-Expires=3000")).status_code == 403
        assert error_of(http.get(url, headers={"Range": "bytes=9999999-"}))["code"] == "range_not_satisfiable"
        with linked.server.http(key=None) as stranger:
            assert stranger.get(url).status_code == 401


def test_a_link_gives_exactly_one_object_and_only_to_its_project(linked: LinkedService) -> None:
    url = f"/v1/jobs/{linked.job_id}/checkpoints/final/files/model.safetensors"
    with linked.server.http() as http, httpx.Client(verify=False) as other:
        created = http.post("/v1/keys", json={"name": "other", "project": "other", "scopes": ["submit"]})
        with linked.server.http(created.json()["key"]) as stranger:
            refused = stranger.get(url)
        assert (refused.status_code, "location" in refused.headers) == (404, False)
        for name in ("..%2fmodel.safetensors", "%2e%2e/%2e%2e/job.json", "model.safetensors%00", "/etc/passwd"):
            answer = http.get(url.replace("model.safetensors", name))
            assert (answer.status_code, "location" in answer.headers) == (404, False), name
        link = http.get(url).headers["location"]
        changed = [
            link.replace("model.safetensors?", "config?"),
            link.replace("/checkpoints/", "/checkpoints/../"),
            link.replace(linked.job_id, "job_000000000000000000000000"),
            link.replace("attachment", "inline"),
            link.replace("response-content-type=", "response-content-type=text%2Fhtml&x="),
            link + "&versionId=1",
        ]
        assert len({link, *changed}) == len(changed) + 1
        for method, forged in [*(("GET", url) for url in changed), *((m, link) for m in ("PUT", "DELETE", "POST"))]:
            answer = other.request(method, forged)
            assert (answer.is_success, WEIGHTS in answer.content) == (False, False), (method, forged)
        assert other.get(link).content == WEIGHTS


def test_the_link_of_a_deleted_object_gives_no_content(linked: LinkedService) -> None:
    job_id = stored_job(linked.server, linked.store)
    content = b'{"text": "a line that is deleted"}\n'
    with linked.server.http() as http, httpx.Client(verify=False) as other:
        sent = http.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "dataset"})
        file, job = f"/v1/files/{sent.json()['id']}", f"/v1/jobs/{job_id}"
        contents = {f"{file}/content": content, f"{job}/checkpoints/final/files/model.safetensors": WEIGHTS}
        links = {url: http.get(url).headers["location"] for url in contents}
        for url, link in links.items():
            assert other.get(link).content == contents[url]
        for path in (file, job):
            http.delete(path).raise_for_status()
        for url, link in links.items():
            wait_until(lambda link=link: other.get(link).status_code == 404, 30, "the object to be removed")
            assert other.get(link, headers={"Range": "bytes=0-9"}).status_code == 404
            assert (http.get(url).status_code, "location" in http.get(url).headers) == (404, False)


def test_the_name_of_a_file_adds_no_header_to_a_link_or_a_download(linked: LinkedService) -> None:
    for name in ('a"; x=y.jsonl', "a%0d%0aSet-Cookie: a=b.jsonl", "\u202elnosj.jsonl", "a;filename=b.html;.jsonl"):
        content = b'{"text": "a line"}\n'
        with linked.server.http() as http, httpx.Client(verify=False) as other:
            files = {"file": (name, content)}
            uploaded = http.post("/v1/files", files=files, data={"purpose": "dataset"})
            if uploaded.status_code != 201:
                assert uploaded.status_code == 422, uploaded.text
                continue
            answer = http.get(f"/v1/files/{uploaded.json()['id']}/content")
            if answer.status_code == 307:
                answer = other.get(answer.headers["location"])
            assert answer.content == content
            header = answer.headers["content-disposition"]
            assert header == f"attachment; filename*=UTF-8''{quote(uploaded.json()['filename'], safe='')}"
            assert "set-cookie" not in answer.headers


def test_content_that_is_not_one_object_comes_from_the_server(linked: LinkedService) -> None:
    url = f"/v1/jobs/{linked.job_id}/checkpoints/final"
    with linked.server.http() as http:
        assert http.get(f"{url}/files/manifest.json").status_code == 200
        assert http.get(f"{url}/archive").status_code == 200
        head = http.head(f"{url}/files/model.safetensors")
        assert (head.status_code, int(head.headers["content-length"])) == (200, len(WEIGHTS))


def test_the_client_follows_links_and_resumes_without_sending_its_key(linked: LinkedService, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(WEIGHTS[:2_000_000])
    linked.relay.sent.clear()
    with Client(linked.server.url, API_KEY) as client:
        download = client.download(linked.job_id, directory=tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    assert {file.sha256 for file in download.files} >= {hashlib.sha256(WEIGHTS).hexdigest()}
    sent = bytes(linked.relay.sent).lower()
    assert b"range: bytes=2000000-" in sent
    assert API_KEY.encode() not in sent
    assert b"authorization: bearer" not in sent


def test_links_need_a_bucket() -> None:
    with pytest.raises(ValidationError, match="set ZETA_ARTIFACTS_URL to s3://bucket/prefix"):
        ServerSettings(worker_secret="secret", downloads="redirect")
