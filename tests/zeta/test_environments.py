"""The `zeta` command in unusual environments: home directories, locales, terminals, disks and settings."""

import json
import os
import pty
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.harness.gateways import Gateway, GatewayResponse
from tests.harness.service import ZETA, clean_environment

CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@pytest.fixture(scope="module")
def closed_gateway() -> Iterator[Gateway]:
    """A closed port in place of a server: a command that gets as far as its request exits with status 4."""
    with Gateway(respond=lambda _method, _path: GatewayResponse(403)).running() as gateway:
        yield gateway


@pytest.fixture
def environment(closed_gateway: Gateway, tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has never used zeta, with the URL of a closed port."""
    variables = {name: value for name, value in clean_environment().items() if name not in CERTIFICATE_VARIABLES}
    variables = {name: value for name, value in variables.items() if not name.lower().endswith("_proxy")}
    home = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config"), "ZETA_URL": closed_gateway.url}
    return {**variables, **home, "ZETA_API_KEY": "key"}


def zeta(environment: dict[str, str], *words: str, through: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*through, ZETA, *words], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def shell(environment: dict[str, str], line: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line in a shell in which ``zeta`` is the command."""
    line = line.replace("zeta", str(ZETA))
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, timeout=60, check=False)


def only_sentence(done: subprocess.CompletedProcess[str]) -> str:
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: "), line
    assert "bug in zeta" not in line
    return line


@pytest.mark.extended
@pytest.mark.parametrize(
    ("variables", "exit_status", "named"),
    [
        ({"ZETA_URL": "http://train-box:8400", "ALL_PROXY": "socks://127.0.0.1:9/"}, 2, "ALL_PROXY"),
        ({"ZETA_URL": "http://train-box:8400", "http_proxy": "proxy:3l28"}, 2, "http_proxy"),
        ({"ZETA_URL": "http://train-box:8400", "HTTP_PROXY": "http://127.0.0.1:9"}, 4, "HTTP_PROXY"),
        ({"ALL_PROXY": "socks://127.0.0.1:9/", "NO_PROXY": "[::1]"}, 4, "HTTP 403"),
        ({"ZETA_URL": "https://train-box", "SSL_CERT_FILE": "/missing.pem"}, 2, "SSL_CERT_FILE"),
        ({"ZETA_URL": "http://train-box:84oo"}, 2, "ZETA_URL"),
        ({"ZETA_URL": "train-box"}, 2, "ZETA_URL"),
        ({"ZETA_API_KEY": "two words"}, 2, "ZETA_API_KEY"),
        ({"ZETA_API_KEY": "schlüssel"}, 2, "ZETA_API_KEY"),
        ({"ZETA_API_KEY": "", "ZETA_API_KEY_FILE": "/missing"}, 2, "ZETA_API_KEY_FILE"),
        ({"ZETA_HOME": "~nobody-of-this-name/x"}, 4, "HTTP 403"),
    ],
)
def test_an_invalid_setting_is_reported_in_one_sentence(
    environment: dict[str, str], variables: dict[str, str], exit_status: int, named: str
) -> None:
    done = zeta({**environment, **variables}, "jobs")
    assert done.returncode == exit_status
    assert named in only_sentence(done)


def test_a_key_file_may_have_a_bom_and_windows_line_ends(environment: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "key"
    variables = {**environment, "ZETA_API_KEY": "", "ZETA_API_KEY_FILE": str(file)}
    file.write_bytes(b"\xef\xbb\xbfkey\r\n")
    assert "HTTP 403" in only_sentence(zeta(variables, "jobs"))
    assert zeta({**variables, "ZETA_API_KEY_FILE": "/dev/zero"}, "jobs").returncode == 2  # an endless file
    for content in ("key\r\n".encode("utf-16"), b"k\xff", b"\r\n"):
        file.write_bytes(content)
        done = zeta(variables, "jobs")
        assert (done.returncode, "ZETA_API_KEY_FILE" in only_sentence(done)) == (2, True)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{", b"[]", b'{"url": 3}', b'{"url": "http://b", "api_key": "a\\nb"}', None]
)
def test_an_unusable_stored_login_is_reported_with_its_path(
    environment: dict[str, str], tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "config" / "zeta" / "login.json"
    if content is None:
        file.mkdir(parents=True)
    else:
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
    done = zeta({**environment, "ZETA_URL": "", "ZETA_API_KEY": ""}, "jobs")
    assert (done.returncode, str(file) in only_sentence(done)) == (2, True)
    assert zeta(environment, "jobs").returncode == 4  # not needed if URL and key are given


def test_a_login_that_cannot_be_stored_is_reported_in_one_sentence(environment: dict[str, str], tmp_path: Path) -> None:
    def respond(_method: str, _path: str) -> GatewayResponse:
        headers = {"Content-Type": "application/json", "X-Request-Id": "req_1"}
        return GatewayResponse(200, b'{"object": "list", "data": []}', headers)

    (tmp_path / "config").touch()
    with Gateway(respond=respond).running() as gateway:
        done = zeta(environment, "login", gateway.url)
    assert (done.returncode, "XDG_CONFIG_HOME" in only_sentence(done)) == (2, True)
    assert zeta(environment, "logout").returncode == 0


def test_a_configured_server_needs_no_home_directory(environment: dict[str, str]) -> None:
    # Containers on OpenShift run as a user without an entry in /etc/passwd.
    nobody = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
    if shutil.which(nobody[0]) is None or subprocess.run([*nobody, "true"], check=False).returncode != 0:
        pytest.skip("this machine allows no user namespace")
    homeless = {name: value for name, value in environment.items() if name not in ("HOME", "XDG_CONFIG_HOME")}
    done = zeta(homeless, "jobs", through=nobody)
    assert (done.returncode, "HTTP 403" in only_sentence(done)) == (4, True)
    assert zeta(homeless, "config", through=nobody).returncode == 0
    assert "zeta login" in only_sentence(zeta({**homeless, "ZETA_URL": ""}, "jobs", through=nobody))
    for words in (("up",), ("down",), ("logout",)):
        done = zeta(homeless, *words, through=nobody)
        assert (done.returncode, "HOME" in only_sentence(done)) == (2, True), words


def test_commands_work_in_a_removed_working_directory(environment: dict[str, str], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    line = f"mkdir {gone}; cd {gone}; rmdir {gone}; zeta"
    assert b"HTTP 403" in shell(environment, f"{line} jobs").stderr
    relative = shell({**environment, "ZETA_HOME": "here", "ZETA_URL": ""}, f"{line} jobs")
    assert (relative.returncode, b"ZETA_HOME" in relative.stderr) == (2, True)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "gbk"])
def test_text_that_the_locale_cannot_encode_is_printed_with_escapes(environment: dict[str, str], encoding: str) -> None:
    known = {**environment, "PYTHONIOENCODING": encoding, "ZETA_WORKER_NAME": "gpu-😀"}
    assert b"gpu-\\ud83d\\ude00" in shell(known, "zeta config").stdout
    settings = json.loads(shell(known, "zeta config --json").stdout)["settings"]
    assert settings["ZETA_WORKER_NAME"] == known["ZETA_WORKER_NAME"]


def test_commands_work_in_the_c_locale(environment: dict[str, str]) -> None:
    c_locale = {**environment, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = zeta({**c_locale, "ZETA_WORKER_NAME": "gpu-箱"}, "config", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["settings"]["ZETA_WORKER_NAME"].startswith("gpu-")


@pytest.mark.parametrize(
    ("line", "exit_status", "stderr"),
    [
        ("zeta config >&-", 0, b""),
        ("zeta config >&- 2>&- <&-", 0, b""),
        ("zeta jobs 2>&-", 4, b""),
        ("zeta config > /dev/full", 1, b"Error: Standard output cannot be written: No space left on device.\n"),
        ("zeta config --json > /dev/full", 1, b'{"error":'),
        ("zeta --help > /dev/full", 1, b"Error: Standard output cannot be written"),
        ("zeta jobs 2> /dev/full", 4, b""),
        ("set -o pipefail; zeta config | head -0", 1, b""),
        ("zeta config | head -1 > /dev/null", 0, b""),
    ],
)
def test_unwritable_output_causes_no_traceback(
    environment: dict[str, str], line: str, exit_status: int, stderr: bytes
) -> None:
    done = shell(environment, line)
    assert done.returncode == exit_status, done
    assert done.stderr.startswith(stderr) if stderr else done.stderr == b""
    assert done.stderr.count(b"\n") <= 1


@pytest.mark.parametrize(
    "terminal", [{"COLUMNS": "0"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}, {"COLUMNS": "-1", "TERM": ""}]
)
def test_help_and_errors_fit_every_terminal(environment: dict[str, str], terminal: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    for words, exit_status in ((["--help"], 0), (["jobs"], 4)):
        done = subprocess.run(
            [ZETA, *words], env={**environment, **terminal}, stdout=theirs, stderr=theirs, check=False
        )
        assert done.returncode == exit_status
    os.close(theirs)
    assert b"Traceback" not in os.read(ours, 65_536)
    os.close(ours)


@pytest.mark.parametrize("words", [["--host", "no-such-host.invalid"], ["--host", "192.0.2.1"], ["--host", "a..b"]])
@pytest.mark.parametrize("more", [["--port", "0"], ["--port", "8499", "--detach"]])
def test_a_host_of_another_machine_is_rejected(
    environment: dict[str, str], tmp_path: Path, words: list[str], more: list[str]
) -> None:
    done = zeta(environment, "up", "--home", str(tmp_path / "home"), *words, *more)
    assert done.returncode == 2, done
    assert words[1] in done.stderr.splitlines()[-1]
    assert "bug in zeta" not in done.stderr


def test_a_home_that_cannot_be_created_is_rejected(environment: dict[str, str]) -> None:
    for home in ("/dev/null/home", "/proc/home"):
        done = zeta(environment, "up", "--home", home)
        assert (done.returncode, home in only_sentence(done)) == (2, True)
