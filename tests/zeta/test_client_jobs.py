"""The jobs that clients return, in threads and with asyncio, and the completion of their ids."""

import asyncio
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from pandas import DataFrame

from tests.harness.ports import free_loopback_port
from tests.harness.service import ZETA, Service
from tests.zeta.conftest import TINY_JOB
from zeta import AsyncClient
from zeta.client import Client
from zeta.client_job import AsyncJob, ClientJob
from zeta_core.contract.errors import NotFound
from zeta_core.contract.job.job import Job

pytestmark = pytest.mark.timeout(300)
SHORT_JOB = {**TINY_JOB, "max_steps": 3, "checkpointing_steps": 3}


@pytest.mark.extended
def test_a_job_can_be_followed_and_measured_by_its_own_methods(client: Client) -> None:
    job = client.submit({**SHORT_JOB, "entity_name": "<b>bold</b>"})
    assert isinstance(job, ClientJob)
    types = [event.type for event in job.events(timeout_seconds=120)]
    assert types[0] == "status"
    assert "checkpoint" in types
    ended = job.wait(timeout_seconds=60)
    assert (job.status, ended.status) == ("queued", "succeeded"), "a job object does not change"
    assert job.refresh() == ended == client.jobs(limit=1)[0]
    frame = ended.metrics()
    assert isinstance(frame, DataFrame)
    assert list(frame.index) == [1, 2, 3]
    losses: Any = frame["loss"]
    assert losses.notna().all()
    assert "eval_loss" not in frame.columns, "an empty curve"
    html: Any = ended._repr_html_()  # pyright: ignore[reportPrivateUsage] - what notebooks call
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    assert "succeeded" in html
    assert ended.model_dump() == Job.model_validate(ended.model_dump()).model_dump()
    assert job.rerun({"max_steps": 1}).wait(timeout_seconds=120).parent == job.id


@pytest.mark.extended
def test_the_async_client_submits_follows_and_measures(service: Service) -> None:
    async def use() -> None:
        async with AsyncClient(service.url, service.api_key) as client:
            jobs = await asyncio.gather(*(client.submit({**SHORT_JOB, "seed": seed}) for seed in (1, 2)))
            assert all(isinstance(job, AsyncJob) for job in jobs)
            seqs = [event.seq async for event in jobs[0].events(timeout_seconds=120)]
            assert seqs == list(range(1, len(seqs) + 1))
            ended = await asyncio.gather(*(job.wait(timeout_seconds=120) for job in jobs))
            assert [job.status for job in ended] == ["succeeded", "succeeded"]
            assert len(await ended[0].metrics()) == 3  # pyright: ignore[reportArgumentType] - a DataFrame here
            assert {job.id for job in jobs} <= {job.id for job in await client.jobs()}
            assert "step 3/3" in "".join([text async for text in client.logs(jobs[0].id)])
            with pytest.raises(NotFound):
                await client.job("job_" + "0" * 24)

    asyncio.run(use())


def test_the_async_client_has_the_parts_of_the_client(service: Service, finished_job: Job, text_file: Path) -> None:
    async def use() -> None:
        loop_thread = threading.get_ident()
        threads: list[int] = []
        async with AsyncClient(service.url, service.api_key) as client:
            key = await client.admin.create_key("Ada", scopes=["read"])
            assert key.id in [listed.id for listed in await client.admin.keys()]
            assert (await client.admin.revoke_key(key.id)).deleted
            assert (await client.admin.audit(object_id=key.id))[0].action == "key.revoke"
            await client.models.add("small", TINY_JOB["model"])
            assert [model.name for model in await client.models.list()] == ["small"]
            await client.models.remove("small")
            sweep = await client.sweeps.create(SHORT_JOB, {"seed": [1, 2]})
            assert len((await client.sweeps.cancel(sweep.id)).jobs) == 2
            stored = await client.upload(text_file, on_bytes=lambda _sent, _size: threads.append(threading.get_ident()))
            assert set(threads) == {loop_thread}, "a callback runs in the thread of the event loop"
            assert await client.jobs_of_file(stored.id) == (await client.files_of_job(finished_job.id)).files == []
            events = await client.stored_events(finished_job.id)
            seen: list[int] = []
            ended = await client.wait(finished_job.id, on_event=lambda event: seen.append(event.seq))
            assert (ended.status, seen) == ("succeeded", [event.seq for event in events])
            assert (await client.receipts.get(finished_job.id)).payload
            (worker,) = await client.workers()
            assert (await client.worker_usage(worker.name, hours=2)).interval_seconds == 300
            assert (await client.drain(worker.name)).status == "draining"
            assert (await client.drain(worker.name, draining=False)).status == "ready"
            assert await client.is_ready()

    asyncio.run(use())


def test_a_cancelled_task_stops_following_at_once(service: Service, endless_job: Job) -> None:
    async def use() -> None:
        async with AsyncClient(service.url, service.api_key) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(3):
                    await client.wait(endless_job.id)
            async for _ in client.events(endless_job.id):
                break
            assert (await client.job(endless_job.id)).status in ("queued", "running")

    asyncio.run(use())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_the_ids_of_jobs_and_the_names_of_workers(
    service: Service, finished_job: Job, shell: str
) -> None:
    words = f"zeta job {finished_job.id[:-2]}"
    variables = {"_ZETA_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": "2"}
    variables |= {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}

    def completed(**more: str) -> str:
        environment = {**service.environment(), **variables, **more}
        return subprocess.run([ZETA], env=environment, capture_output=True, text=True, timeout=60, check=False).stdout

    assert finished_job.id in completed()
    with Client(service.url, service.api_key) as client:
        worker = client.workers()[0].name
    drain = {"COMP_WORDS": "zeta worker drain ", "COMP_CWORD": "3", "_TYPER_COMPLETE_ARGS": "zeta worker drain "}
    assert worker in completed(**drain)
    assert finished_job.id not in completed(ZETA_URL=f"http://127.0.0.1:{free_loopback_port()}"), "no server, no error"
