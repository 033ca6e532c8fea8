"""Only an earlier job with the same workload on the same kind of device provides an estimate of time and memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.estimates.earlier_jobs import EarlierJob, find_earlier_job
from tests.harness.fleet import SECRET, SmallFleet, small_fleet
from tests.harness.simulated_worker import SimulatedWorker
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import SPEC
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.spec.defaults import resolve
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.spec.validation import parse

DECIDED: dict[str, Any] = {"device": "cpu", "batch_size": 8, "global_batch_size": 32, "total_sequences": 128}

MEMORY = {"weights": 4, "gradients": 4, "optimizer": 8, "activations": 100}


class EarlierJobs:
    """A server with a worker ``w1``, the jobs that it has run, and estimates from them."""

    def __init__(self, fleet: SmallFleet) -> None:
        self._fleet = fleet
        self.engine = fleet.start_engine()
        self._rows = Rows(fleet.settings)

    def find(
        self, fields: dict[str, Any] | None = None, *, project: str = "default", **resolved: Any
    ) -> EarlierJob | str:
        """The earlier job on which the estimate of a spec is based, or the reason why there is none."""
        found = self._fleet.loop.run(self._find(fields or {}, resolved, project))
        return found if isinstance(found, str) else found[0]

    async def _find(
        self, fields: dict[str, Any], resolved: dict[str, Any], project: str
    ) -> tuple[EarlierJob, str] | str:
        spec = parse(JobSpec, {**SPEC, **fields})
        async with self._fleet.database.read() as session:
            decided = resolve(spec).updated(ResolvedSpec.model_validate(resolved))
            return await find_earlier_job(session, self.engine, project, spec, decided)

    def add(self, seconds: float, spec: dict[str, Any] | None = None, **decided: Any) -> str:
        """A successful job of 4 steps whose only attempt ran on the worker ``w1``."""
        job_id = self._rows.job(spec=spec)
        self._rows.attempt(job_id, progress=[{"phase": "training", "step": 4}], to=JobStatus.SUCCEEDED)
        submitted = parse(JobSpec, {**SPEC, **(spec or {})})
        self._rows.change(
            job_id,
            resolved_spec=resolve(submitted).updated(ResolvedSpec.model_validate({**DECIDED, **decided})),
            progress={"step": 4},
            result={"tokens": 8000, "train_seconds": seconds, "memory": MEMORY},
        )
        return job_id


@pytest.fixture
def earlier_jobs(tmp_path: Path, redis_url: str) -> Iterator[EarlierJobs]:
    with small_fleet(tmp_path, redis_url) as fleet:
        yield EarlierJobs(fleet)


@pytest.fixture
def worker(earlier_jobs: EarlierJobs, shared_valkey: ValkeyServer) -> Iterator[SimulatedWorker]:
    with shared_valkey.client() as client:
        worker = SimulatedWorker(client, SECRET, "w1")

        def is_alive() -> bool:
            worker.send_heartbeat()
            return earlier_jobs.engine.is_alive("w1")

        wait_until(is_alive, 15, "the worker to be known")
        yield worker


def test_without_a_worker_or_an_earlier_job_the_reason_is_stated(
    earlier_jobs: EarlierJobs, request: pytest.FixtureRequest
) -> None:
    assert "no connected worker can run the job" in str(earlier_jobs.find())
    request.getfixturevalue("worker")
    assert "on this kind of device (1 CPU core)" in str(earlier_jobs.find())


def test_an_estimate_uses_the_longest_comparable_job_on_the_same_device(
    earlier_jobs: EarlierJobs, worker: SimulatedWorker
) -> None:
    earlier_jobs.add(2.0)
    longest = earlier_jobs.add(4.0)
    earlier_jobs.add(8.0, {"resume_from_checkpoint": f"{longest}/step-4"})
    earlier_jobs.add(8.0, device="cuda:0")
    earlier_jobs.add(8.0, {"seq_len": 32})
    worker.send_heartbeat()
    found = earlier_jobs.find()
    assert isinstance(found, EarlierJob)
    time = found.training_time(1280, "1 CPU core")
    assert (time.job, time.seconds, time.tokens_per_second) == (longest, 40.0, 2000.0)
    assert longest in time.meaning
    assert found.measured_memory is not None
    assert found.measured_memory.model_dump() == {**MEMORY, "job": longest}


def test_only_jobs_with_the_same_work_are_comparable(earlier_jobs: EarlierJobs, worker: SimulatedWorker) -> None:
    earlier_jobs.add(4.0)
    unpacked = earlier_jobs.add(1.0, {"pack": False})
    worker.send_heartbeat()
    for same in ({"batch_size": 8}, {"learning_rate": 1.0, "metadata": {"a": "b"}}, {"max_steps": 9}):
        assert isinstance(earlier_jobs.find(same, batch_size=8), EarlierJob), same
    for other in ({"lora": {}}, {"batch_size": 4}, {"mixed_precision": "bf16"}, {"resources": {"processes": 2}}):
        assert isinstance(earlier_jobs.find(other), str), other
    assert isinstance(earlier_jobs.find(project="another"), str)
    padded = earlier_jobs.find({"pack": False})  # such rows are as long as their documents
    assert isinstance(padded, EarlierJob)
    assert padded.id == unpacked
    assert isinstance(earlier_jobs.find({"pack": False, "dataset": {"path": "other.txt"}}), str)
    assert isinstance(earlier_jobs.find({"resources": {"gpus": 1}}), str), "no worker has a GPU"
