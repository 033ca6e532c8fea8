"""Following a job through gateways that buffer, compress or cut the connection, against the real service."""

import contextlib
import functools
import json
import subprocess
import threading
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tests.harness.gateways import Gateway, GatewayResponse
from tests.harness.service import ZETA, Service
from tests.harness.tcp_relay import TcpRelay
from tests.harness.waiting import wait_until
from zeta import event_stream, log_stream
from zeta.client import Client
from zeta_core.contract.job.events import Event, ProgressEvent
from zeta_core.contract.job.job import Job

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def short_silences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that detects a withheld stream after one second."""
    monkeypatch.setattr(event_stream, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(event_stream, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(log_stream, "FIRST_SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(log_stream, "POLL_SECONDS", 0.1)


@contextlib.contextmanager
def in_background(work: Callable[[], object]) -> Generator[None]:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive()


def refuse_streams(method: str, path: str) -> GatewayResponse | None:
    """Behave like a gateway that rejects responses that exceed its time-out."""
    return GatewayResponse(504) if method == "GET" and path.endswith("/events") else None


def is_past_step(events: list[Event], step: int) -> bool:
    return any(isinstance(event, ProgressEvent) and (event.step or 0) > step for event in list(events))


@pytest.mark.extended
def test_every_event_arrives_once_through_any_gateway(service: Service, client: Client, endless_job: Job) -> None:
    gateways = {
        "buffering": Gateway(service.port, buffers=True),
        "compressing": Gateway(service.port, compresses=True),
        "refusing streams": Gateway(service.port, respond=refuse_streams),
        "ending streams at once": Gateway(service.port, cuts_events_at=len("retry: 2000\n\n")),
    }
    relay = TcpRelay(service.port, idle_seconds=0.2)
    seen: dict[str, list[Event]] = {name: [] for name in (*gateways, "cutting")}

    def follow(name: str, through: Client) -> None:
        for event in through.events(endless_job.id, timeout_seconds=200):
            seen[name].append(event)

    with contextlib.ExitStack() as stack:
        stack.callback(relay.close)
        urls = {name: stack.enter_context(gateway.running()).url for name, gateway in gateways.items()}
        urls["cutting"] = f"http://127.0.0.1:{relay.port}"
        for name, url in urls.items():
            through = stack.enter_context(Client(url, service.api_key))
            stack.enter_context(in_background(functools.partial(follow, name, through)))
        for name, events in seen.items():
            wait_until(functools.partial(is_past_step, events, 3), 100, f"progress through the {name} gateway")
        wait_until(lambda: relay.num_idle_cuts >= 3, 60, "the relay to cut the stream three times")
        client.cancel(endless_job.id)
    stored = client.stored_events(endless_job.id)
    assert {name: events == stored for name, events in seen.items()} == dict.fromkeys(seen, True)


@pytest.mark.extended
def test_a_followed_log_is_complete_through_any_gateway(service: Service, client: Client, endless_job: Job) -> None:
    wait_until(lambda: "".join(client.logs(endless_job.id)), 60, "the first bytes of the log")
    relay = TcpRelay(service.port, idle_seconds=0.3)
    shown: dict[str, list[str]] = {"cut": [], "cut, tail 1": [], "cut, tail 0": [], "buffered": []}
    tails = {"cut, tail 1": 1, "cut, tail 0": 0}

    def follow(name: str, through: Client) -> None:
        shown[name].extend(through.logs(endless_job.id, follow=True, tail=tails.get(name)))

    with contextlib.ExitStack() as stack:
        stack.callback(relay.close)
        buffering = stack.enter_context(Gateway(service.port, buffers=True).running())
        for name in shown:
            url = buffering.url if name == "buffered" else f"http://127.0.0.1:{relay.port}"
            through = stack.enter_context(Client(url, service.api_key, patience_seconds=0.5))
            stack.enter_context(in_background(functools.partial(follow, name, through)))
        # More interruptions than the patience of half a second would allow if new connections did not renew it.
        wait_until(lambda: relay.num_idle_cuts >= 15, 60, "the relay to cut each quiet connection five times")
        wait_until(lambda: shown["buffered"], 60, "the first piece through the buffering gateway, while the job runs")
        assert client.job(endless_job.id).status == "running"
        client.cancel(endless_job.id)
        client.wait(endless_job.id, timeout_seconds=60)
    whole = "".join(client.logs(endless_job.id))
    assert "".join(shown["cut"]) == whole
    assert "".join(shown["buffered"]) == whole
    for name in tails:
        mark, _, rest = "".join(shown[name]).partition("\n")
        assert whole.startswith(f"{mark}\n")
        assert whole.endswith(rest), name


@pytest.mark.parametrize("drops", [frozenset[str](), frozenset({"range", "if-range", "accept-encoding"})])
def test_an_interrupted_download_is_completed_through_a_gateway(
    service: Service, client: Client, finished_job: Job, tmp_path: Path, drops: frozenset[str]
) -> None:
    """The gateway compresses responses, and in one case ignores range requests."""
    done = client.download(finished_job.id, directory=tmp_path / "direct")
    weights = (done.directory / "model.safetensors").read_bytes()
    part = tmp_path / "through" / "model.safetensors.part"
    part.parent.mkdir()
    part.write_bytes(weights[: len(weights) // 3])
    gateway = Gateway(service.port, compresses=True, drops=drops)
    with gateway.running(), Client(gateway.url, service.api_key) as through:
        through.download(finished_job.id, directory=part.parent)
    for file in done.files:
        assert (part.parent / file.path).read_bytes() == (done.directory / file.path).read_bytes()


@pytest.mark.extended
def test_waiting_prints_progress_into_a_pipe_while_the_job_runs(
    service: Service, client: Client, endless_job: Job
) -> None:
    waiting = subprocess.Popen(
        [ZETA, "wait", endless_job.id], env=service.environment(), stdout=subprocess.PIPE, text=True
    )
    assert waiting.stdout is not None
    assert any("step " in line for line in waiting.stdout)  # before the job's end
    client.cancel(endless_job.id)
    *_, last = waiting.stdout
    assert waiting.wait(30) == 3
    assert f"{endless_job.id} cancelled" in last
    again = service.command("wait", endless_job.id)
    assert again.stdout == last  # the history of an ended job is not repeated


def test_a_gateway_refusal_is_distinguished_from_a_wrong_address(service: Service, endless_job: Job) -> None:
    def refuse(method: str, path: str) -> GatewayResponse | None:
        return GatewayResponse(403) if method == "POST" else None

    with Gateway(service.port, respond=refuse).running() as gateway:
        environment = {**service.environment(), "ZETA_URL": gateway.url}
        done = subprocess.run(
            [ZETA, "cancel", endless_job.id, "--json"], env=environment, capture_output=True, text=True, check=False
        )
    error = json.loads(done.stderr)["error"]
    assert (done.returncode, error["code"]) == (1, "refused_by_gateway")
    assert "nginx" in error["message"]
    assert "POST" in error["message"]
