"""Real runs that a worker forks: the same bits as from a cold start, and every kill is survived."""

import signal
import sys

import psutil
import pytest

from tests.end_to_end.specs import TINY_LLAMA, tiny_job
from tests.harness.fleet import SmallFleet
from tests.harness.service import processes_of_job
from tests.harness.waiting import wait_until
from zeta_core.contract.job.checkpoint import Manifest
from zeta_core.contract.wire.run_directory import checkpoint_key
from zeta_core.system.artifact_store.folder import FolderStore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="warm starts need Linux")

STEPS, INTERVAL = 400, 50
SPEC = tiny_job(
    model={"config": {**TINY_LLAMA, "attention_dropout": 0.1}}, max_steps=STEPS, checkpointing_steps=INTERVAL
)
READY = "The fork server is ready"


def hashes_of(fleet: SmallFleet, job_id: str) -> dict[str, str]:
    """The files of the final checkpoint with their hashes."""
    folder = FolderStore(fleet.settings.artifacts).local(checkpoint_key(job_id, "final"))
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    return {file.path: file.sha256 for file in manifest.files if file.path.endswith(".safetensors")}


def start_warm_worker(fleet: SmallFleet, name: str = "w1", times: int = 1) -> psutil.Process:
    """Start a worker, and return it when its fork server has been ready as often as ``times``."""
    process = fleet.start_worker(name, small=False, ZETA_STOP_GRACE_SECONDS="30")
    log = fleet.folder / f"{name}.log"
    wait_until(lambda: log.read_text().count(READY) >= times, 180, "the fork server to be ready")
    return psutil.Process(process.pid)


def fork_server_of(worker: psutil.Process) -> psutil.Process:
    (server,) = [child for child in worker.children() if "fork-server" in child.cmdline()]
    return server


def first_process(job_id: str) -> psutil.Process:
    return psutil.Process(min(processes_of_job(job_id)))


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_warm_runs_have_the_bits_of_cold_ones_and_survive_every_kill(fleet: SmallFleet) -> None:
    cold_worker = fleet.start_worker("cold", small=False, ZETA_WARM_START="no")
    cold = fleet.submit(spec=SPEC)
    fleet.wait_for_status(cold, "succeeded", 180)
    cold_worker.terminate()
    cold_worker.wait(60)
    expected = hashes_of(fleet, cold)
    assert expected

    worker = start_warm_worker(fleet)
    server = fork_server_of(worker)
    undisturbed = fleet.submit(spec=SPEC)
    wait_until(lambda: processes_of_job(undisturbed), 60, "the run to be started")
    assert first_process(undisturbed).ppid() == server.pid
    fleet.wait_for_status(undisturbed, "succeeded", 120)
    assert hashes_of(fleet, undisturbed) == expected

    # The run is killed, and its next attempt is forked as well.
    killed = fleet.submit(spec=SPEC)
    fleet.wait_for_step(killed, INTERVAL + 10, 60)
    first_process(killed).kill()
    wait_until(lambda: fleet.job(killed).attempt == 2 and processes_of_job(killed), 60, "the second attempt")
    assert first_process(killed).ppid() == server.pid

    # Its fork server is killed, then its worker. The next process of the worker adopts it.
    server.kill()
    worker.send_signal(signal.SIGKILL)
    start_warm_worker(fleet, times=2)
    fleet.wait_for_status(killed, "succeeded", 120)
    first, second = fleet.attempts(killed)
    assert (first.reason, second.reason) == ("process_killed", "completed"), fleet.logs()
    assert hashes_of(fleet, killed) == expected
    fleet.check_events(killed)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_warm_runs_can_be_paused_cancelled_and_handed_back(fleet: SmallFleet) -> None:
    worker = start_warm_worker(fleet)
    server = fork_server_of(worker)
    spec = {**SPEC, "max_steps": 1_000_000, "checkpointing_steps": 1_000_000}  # only the checkpoint of a stop
    paused = fleet.submit(spec=spec)
    fleet.wait_for_step(paused, 5, 60)
    assert first_process(paused).ppid() == server.pid
    fleet.request(paused, "pause")
    fleet.wait_for_status(paused, "paused", 60)
    assert len(fleet.checkpoints(paused)) == 1

    cancelled = fleet.submit(spec=spec)
    fleet.wait_for_step(cancelled, 5, 60)
    fleet.request(cancelled, "cancel")
    fleet.wait_for_status(cancelled, "cancelled", 60)
    assert not processes_of_job(cancelled)

    handed_back = fleet.submit(spec=spec)
    fleet.wait_for_step(handed_back, 5, 60)
    worker.terminate()
    fleet.wait_for_status(handed_back, "queued", 60)
    (attempt,) = fleet.attempts(handed_back)
    assert (attempt.reason, len(fleet.checkpoints(handed_back))) == ("handed_back", 1)
    wait_until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, 30, "the fork server's exit")
