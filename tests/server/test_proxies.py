"""Behind reverse proxies: the published path prefix, and the trusted sources of client addresses."""

from collections.abc import Iterator

import httpx
import pytest

from server.settings import ServerSettings
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.server_process import SPEC, ServerProcess, error_of, running_server
from zeta_core.contract.errors import InvalidSettings

FILE = {"files": {"file": ("a.txt", b"text")}, "data": {"purpose": "dataset"}}


@pytest.fixture(scope="module")
def proxied_server(shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that a proxy on this machine publishes at /zeta/v2."""
    home = tmp_path_factory.mktemp("published")
    settings = {"ZETA_ROOT_PATH": "/zeta/v2/", "ZETA_TRUSTED_PROXIES": "127.0.0.1, 10.0.0.0/8, fd00::/8"}
    with running_server(home, shared_valkey.url, **settings) as process:
        yield process


@pytest.mark.parametrize("prefix", ["", "/zeta/v2"])
def test_requests_match_with_and_without_the_prefix(proxied_server: ServerProcess, prefix: str) -> None:
    with proxied_server.http() as http:
        job = http.post(f"{prefix}/v1/jobs", json=SPEC)
        assert job.headers["location"] == f"/zeta/v2/v1/jobs/{job.json()['id']}"
        assert http.get(job.headers["location"]).json()["id"] == job.json()["id"]
        rerun = http.post(f"{prefix}/v1/jobs/{job.json()['id']}/rerun")
        assert rerun.headers["location"] == f"/zeta/v2/v1/jobs/{rerun.json()['id']}"
        file = http.post(f"{prefix}/v1/files", **FILE)  # pyright: ignore[reportArgumentType]
        assert http.get(file.headers["location"]).json() == file.json()
        assert http.get(f"{prefix}/healthz").status_code == 200
        assert http.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/zeta/v2"}]
        missing = http.get(f"{prefix}/v1/nothing")
        assert (missing.status_code, error_of(missing)["code"]) == (404, "route_not_found")
        refused = http.delete(f"{prefix}/v1/jobs")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD, POST")
        created = http.post(f"{prefix}/v1/keys", json={"name": "n", "scopes": ["read"]})
        assert http.get(created.headers["location"]).json()["id"] == created.json()["id"]


@pytest.mark.parametrize("path", ["/zeta/v1/jobs", "/zeta/v2v1/jobs", "/zeta/v2/zeta/v2/v1/jobs", "/zeta/v2"])
def test_other_prefixes_are_not_found(proxied_server: ServerProcess, path: str) -> None:
    with proxied_server.http() as http:
        assert http.get(path).status_code == 404


def client_in_log(server: ServerProcess, headers: dict[str, str] | list[tuple[str, str]], mark: str) -> str:
    """The address that the log shows as the client of a request with these headers."""
    httpx.get(f"{server.url}/v1/{mark}", headers=headers)
    lines = wait_until(
        lambda: [line for line in server.log().splitlines() if f"/v1/{mark} was answered" in line],
        10,
        "the request's line in the log",
    )
    return lines[-1].rpartition(", for ")[2].removesuffix(".")


CHAINS = [
    ({"X-Forwarded-For": "198.51.100.7"}, "198.51.100.7"),
    ({"X-Forwarded-For": "6.6.6.6, 198.51.100.7, 10.1.2.3"}, "198.51.100.7"),
    ({"X-Forwarded-For": "6.6.6.6, unknown"}, "127.0.0.1"),
    ({"X-Forwarded-For": "2001:db8::7, fd00::1"}, "2001:db8::7"),
    ({"X-Forwarded-For": "198.51.100.7:4711"}, "198.51.100.7"),
    ({"Forwarded": "for=198.51.100.7;proto=https"}, "198.51.100.7"),
    ({"Forwarded": 'for=6.6.6.6, for="[2001:db8::7]:4711";host="a,b", for=10.0.0.1'}, "2001:db8::7"),
    ({"Forwarded": "for=_hidden"}, "127.0.0.1"),
    ({"Forwarded": 'for="x"y";;,,="'}, "127.0.0.1"),
    ([("X-Forwarded-For", "6.6.6.6"), ("X-Forwarded-For", "198.51.100.8")], "198.51.100.8"),
    ({"Forwarded": "for=198.51.100.7", "X-Forwarded-For": "6.6.6.6"}, "198.51.100.7"),
    ({"X-Forwarded-For": "<script>, 1.2.3.4.5"}, "127.0.0.1"),
]


@pytest.mark.parametrize(("headers", "client"), CHAINS)
def test_the_client_is_the_nearest_untrusted_address(
    proxied_server: ServerProcess, server: ServerProcess, headers: dict[str, str], client: str
) -> None:
    mark = f"chain-{CHAINS.index((headers, client))}"
    assert client_in_log(proxied_server, headers, mark) == client
    assert client_in_log(server, headers, mark) == "127.0.0.1", "nobody is trusted by default"


@pytest.mark.parametrize(
    ("prefix", "location"),
    [
        ("/other", "/other/v1/jobs/"),
        ("/other/", "/other/v1/jobs/"),
        ("/", "/v1/jobs/"),
        ("//evil.example", "/zeta/v2/v1/jobs/"),
        ("/a\\b", "/zeta/v2/v1/jobs/"),
        ("javascript:", "/zeta/v2/v1/jobs/"),
    ],
)
def test_a_forwarded_prefix_is_used_if_it_is_a_path(
    proxied_server: ServerProcess, server: ServerProcess, prefix: str, location: str
) -> None:
    for process, expected in ((proxied_server, location), (server, "/v1/jobs/")):
        with process.http() as http:
            response = http.post("/v1/jobs", json=SPEC, headers={"X-Forwarded-Prefix": prefix})
            assert response.headers["location"] == expected + response.json()["id"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ZETA_ROOT_PATH", "zeta"),
        ("ZETA_ROOT_PATH", "//zeta"),
        ("ZETA_ROOT_PATH", "/a b"),
        ("ZETA_TRUSTED_PROXIES", "proxy.example"),
        ("ZETA_TRUSTED_PROXIES", "10.0.0.0/40"),
    ],
)
def test_an_invalid_proxy_setting_is_reported(variable: str, value: str) -> None:
    with pytest.raises(InvalidSettings, match=f"{variable} is {value!r}: "):
        ServerSettings.from_environment({variable: value, "ZETA_WORKER_SECRET": "s"})
