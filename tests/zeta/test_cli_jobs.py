"""The command line with a real service: commands, their output as text and JSON, and their exit statuses."""

import contextlib
import hashlib
import json
import os
import pty
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.harness.service import ZETA, Service
from tests.harness.waiting import wait_until
from tests.zeta.conftest import ENDLESS_JOB, TINY_JOB
from zeta.client import Client
from zeta_core.contract.job.job import Job

pytestmark = pytest.mark.timeout(300)

SPEC_YAML = """
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
           vocab_size: 384, max_position_embeddings: 128}
seq_len: 64
batch_size: 4
gradient_accumulate_every: 1
learning_rate: 1e-3   # a number in YAML 1.2
max_steps: 500
checkpointing_steps: 500
"""


def test_a_spec_with_a_local_file_is_submitted_followed_and_downloaded(
    service: Service, client: Client, text_file: Path, tmp_path: Path
) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text(SPEC_YAML)
    done = service.command(
        "submit", str(spec), "--data", str(text_file), "--set", "max_steps=3", "--set", "metadata.from=cli", "--follow",
        timeout_seconds=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stdout
    assert done.stdout.count("succeeded") == 1
    assert f"{text_file} is file_" in done.stderr
    (job,) = client.jobs(metadata={"from": "cli"})
    assert job.spec["learning_rate"] == 0.001
    assert job.spec["dataset"] == {"file": client.upload(text_file).id}

    target = tmp_path / "model"
    fetched = service.command("download", job.id, "-o", str(target))
    assert fetched.returncode == 0, fetched.stderr
    lines = [line for line in fetched.stdout.splitlines() if "sha256" in line]
    assert len(lines) >= 2
    for line in lines:
        words = line.split()
        assert hashlib.sha256((target / words[0]).read_bytes()).hexdigest() == words[words.index("sha256") + 1]
        assert words[-1] == "verified"
    again = json.loads(service.command("download", job.id, "-o", str(target), "--json").stdout)
    assert again["checkpoint"] == "final"
    assert all(file["verified"] for file in again["files"])


def test_an_invalid_spec_exits_with_2_and_names_every_invalid_field(service: Service, tmp_path: Path) -> None:
    spec = tmp_path / "job.json"
    spec.write_text(json.dumps({**TINY_JOB, "batch_size": 0, "save_steps": 3}))
    done = service.command("submit", str(spec))
    assert done.returncode == 2
    assert "batch_size" in done.stderr
    assert "checkpointing_steps" in done.stderr
    assert "Traceback" not in done.stderr
    lora = service.command("submit", "--model", "org/name", "--data", "python-docs", "--lora", "--set", "lora.r=0")
    assert lora.returncode == 2
    assert "lora.r" in lora.stderr


def test_jobs_are_listed_and_shown_as_text_and_as_json(service: Service, finished_job: Job) -> None:
    listed = json.loads(service.command("jobs", "--status", "succeeded", "--json").stdout)
    assert listed["object"] == "list"
    assert finished_job.id in [job["id"] for job in listed["data"]]
    assert finished_job.id in service.command("jobs", "--name", "finished").stdout
    shown = service.command("job", finished_job.id)
    assert "succeeded (completed)" in shown.stdout
    assert json.loads(service.command("job", finished_job.id, "--json").stdout)["id"] == finished_job.id
    assert service.command("jobs", "--status", "sleeping").returncode == 2
    by_loss = json.loads(service.command("jobs", "--sort", "-loss", "--all", "--json").stdout)["data"]
    losses = [job["progress"]["recent_loss"] for job in by_loss if (job["progress"] or {}).get("recent_loss")]
    assert losses
    assert losses == sorted(losses, reverse=True)
    unknown = service.command("jobs", "--sort", "los")
    assert unknown.returncode == 2
    assert "'eval_loss'" in unknown.stderr


def test_an_id_may_be_shortened_while_it_is_unique(service: Service, client: Client, finished_job: Job) -> None:
    newest = client.submit({**TINY_JOB, "entity_name": "newest"})
    client.cancel(newest.id)
    ids = [job.id for job in client.jobs(limit=None)]
    beginning = next(
        finished_job.id[:length]
        for length in range(5, len(finished_job.id))
        if sum(job_id.startswith(finished_job.id[:length]) for job_id in ids) == 1
    )
    for text in (beginning, beginning.removeprefix("job_")):
        assert json.loads(service.command("job", text, "--json").stdout)["id"] == finished_job.id
    assert json.loads(service.command("job", "@last", "--json").stdout)["id"] == newest.id
    assert json.loads(service.command("job", finished_job.id[:-1], "--json").stdout)["id"] == finished_job.id
    several = service.command("job", "job_")
    assert several.returncode == 2
    assert str(len(ids)) in several.stderr
    none = service.command("job", "job_zzzz")
    assert none.returncode == 1
    assert "zeta jobs" in none.stderr


def test_events_logs_and_checkpoints_are_printed(service: Service, client: Client, finished_job: Job) -> None:
    printed = [json.loads(line) for line in service.command("events", finished_job.id, "--json").stdout.splitlines()]
    assert printed == [
        event.model_dump(mode="json", exclude_unset=True) for event in client.stored_events(finished_job.id)
    ]
    followed = service.command("events", finished_job.id, "--follow", "--after", "2", "--json").stdout.splitlines()
    assert [json.loads(line) for line in followed] == printed[2:]
    log = service.command("logs", finished_job.id).stdout
    assert log == "".join(client.logs(finished_job.id))
    assert "step 8/8  loss" in log  # the Trainer logs its progress, so `zeta logs -f` shows it
    named = service.command("checkpoints", finished_job.id)
    assert "step-8" in named.stdout
    manifests = json.loads(service.command("checkpoints", finished_job.id, "--json").stdout)["data"]
    assert "final" in [manifest["name"] for manifest in manifests]


def test_files_and_workers_are_listed(service: Service, text_file: Path) -> None:
    uploaded = json.loads(service.command("upload", str(text_file), "--json").stdout)
    assert uploaded["sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()
    listed = json.loads(service.command("files", "--json").stdout)["data"]
    assert uploaded["id"] in [file["id"] for file in listed]
    assert uploaded["id"] in service.command("files", "--sha256", uploaded["sha256"]).stdout
    assert "cpu" in service.command("workers", "--json").stdout


def test_the_exit_status_of_wait_shows_how_the_job_ended(service: Service, client: Client, finished_job: Job) -> None:
    succeeded = service.command("wait", finished_job.id)
    assert (succeeded.returncode, "succeeded" in succeeded.stdout) == (0, True)
    missing = client.submit({**TINY_JOB, "dataset": {"file": client.upload(_invalid_data(service.home)).id}})
    failed = service.command("wait", missing.id, timeout_seconds=240)
    assert failed.returncode == 1
    assert "invalid_data" in failed.stdout
    assert json.loads(service.command("wait", missing.id, "--json").stdout)["status"] == "failed"


def test_a_terminal_shows_a_progress_bar(service: Service, finished_job: Job) -> None:
    master, slave = pty.openpty()
    with subprocess.Popen([ZETA, "wait", finished_job.id], env=service.environment(), stdout=slave) as waiting:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # raised by a terminal that was closed by its last writer
            while chunk := os.read(master, 65536):
                shown += chunk
        os.close(master)
    assert waiting.returncode == 0
    assert b"8/8" in shown
    assert b"succeeded" in shown


@pytest.mark.extended
def test_ctrl_c_detaches_and_the_job_continues_until_cancelled(
    service: Service, client: Client, tmp_path: Path
) -> None:
    spec = tmp_path / "endless.json"
    spec.write_text(json.dumps(ENDLESS_JOB))
    following = subprocess.Popen(
        [ZETA, "submit", spec, "--follow", "--json"],
        env=service.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert following.stdout is not None
    job_id = json.loads(following.stdout.readline())["id"]
    assert any(_is_step(json.loads(line)) for line in following.stdout)
    following.send_signal(signal.SIGINT)
    _, errors = following.communicate(timeout=30)
    assert following.returncode == 130
    error = json.loads(errors)["error"]
    assert error["code"] == "detached"
    assert job_id in error["message"]
    assert client.job(job_id).status == "running"

    queued = client.submit(TINY_JOB)  # the only slot is taken
    wait_until(lambda: client.job(queued.id).waiting_reason, 20, "the waiting reason of the queued job")
    assert "workers_busy" in service.command("job", queued.id).stdout
    for job in (queued.id, job_id):
        assert service.command("cancel", job).returncode == 0
        ended = service.command("wait", job)
        assert (ended.returncode, "cancelled" in ended.stdout) == (3, True)
    assert service.command("cancel", job_id).returncode == 1


@pytest.mark.extended
def test_jobs_are_paused_resumed_rerun_deleted_and_limited_in_time(service: Service, client: Client) -> None:
    job_id = client.submit(ENDLESS_JOB).id

    def steps() -> int:
        step: Any = (client.job(job_id).progress or {}).get("step")
        return int(step or 0)

    wait_until(steps, 60, "the first step")
    assert "is saving a checkpoint" in service.command("pause", job_id).stdout
    wait_until(lambda: client.job(job_id).status == "paused", 60, "the pause")
    wait_until(lambda: client.workers()[0].slots[0].job_id is None, 20, "the device to be free")
    assert client.job(job_id).attempt == 1, client.job(job_id).attempts
    paused_at = client.checkpoint(job_id, "latest").step
    assert service.command("pause", job_id).returncode == 1  # it is already paused
    assert json.loads(service.command("resume", job_id, "--json").stdout)["status"] in ("queued", "running")
    wait_until(lambda: steps() > paused_at, 60, "the next step after the pause")
    assert client.job(job_id).attempts[1].first_step == paused_at + 1
    assert re.search(r"^attempt +2 \(1: paused by user\)$", service.command("job", job_id).stdout, re.MULTILINE)
    assert service.command("cancel", job_id).returncode == 0
    assert service.command("wait", job_id).returncode == 3

    changed = ("--set", f"max_steps={paused_at + 2}", "--set", "time_limit_seconds=3600")
    rejected = service.command("rerun", job_id, "--from", "latest", *changed, "--set", "seed=8")
    assert (rejected.returncode, "seed" in rejected.stderr, "start" in rejected.stderr) == (2, True, True)
    done = service.command("rerun", job_id, "--from", f"step-{paused_at}", *changed, "--follow", timeout_seconds=240)
    assert done.returncode == 0, done.stderr
    child = client.jobs(limit=1)[0]
    assert (child.parent, child.attempts[0].first_step) == (job_id, paused_at + 1)

    short = client.submit({**ENDLESS_JOB, "time_limit_seconds": 1})
    ended = client.wait(short.id, timeout_seconds=120)
    assert (ended.status, ended.status_reason) == ("failed", "time_limit")
    assert ended.checkpoints == (ended.attempts[-1].last_step is not None)  # the steps trained so far are saved

    assert json.loads(service.command("delete", job_id, "--json").stdout)["deleted"] is True
    assert service.command("job", job_id).returncode == 1


@pytest.mark.extended
def test_a_worker_validates_a_spec_and_the_result_is_cached(
    service: Service, client: Client, finished_job: Job, tmp_path: Path
) -> None:
    spec = tmp_path / "job.json"
    spec.write_text(json.dumps(TINY_JOB))

    def complete_result() -> dict[str, Any] | None:
        """The result, once a worker has checked the spec; on a busy machine, this may take several requests."""
        result = json.loads(service.command("validate", str(spec), "--json").stdout)
        return result if "isolates" not in result["pending"] else None

    found = wait_until(complete_result, 150, "the worker's check") or {}
    assert found["isolates"] is True
    assert found["vocabulary"]["fits"] is True
    assert found["steps"] == 8
    assert found["disk"]["bytes"] > 4 * found["parameters"]
    assert found["memory"]["activations"] > 0
    measured = found["memory"]["measured"]
    assert measured["gradients"] == found["memory"]["gradients"]
    assert measured["weights"] == pytest.approx(found["memory"]["weights"], rel=0.01)
    assert finished_job.result is not None
    assert finished_job.result.memory is not None
    assert found["pending"] == {}
    counted_by, seconds = client.job(found["time"]["job"]), found["time"]["seconds"]
    assert counted_by.result is not None
    assert counted_by.result.train_seconds is not None
    num_steps = (counted_by.progress or {})["step"]
    assert isinstance(num_steps, int)
    seconds_per_step = counted_by.result.train_seconds / num_steps
    assert seconds == pytest.approx(found["steps"] * seconds_per_step, abs=0.06)
    assert finished_job.status == "succeeded", "at least one such job has run"
    again = client.validate(TINY_JOB)
    assert (again.parameters, again.isolates) == (found["parameters"], True)
    shown = service.command("validate", str(spec))
    assert (shown.returncode, "The job is valid." in shown.stdout) == (0, True)
    assert f"{found['data']['rows']} rows (text), about {found['data']['tokens']:,} tokens" in shown.stdout
    rows = [{"prompt": f"{number} and 1: ", "completion": f"{number + 1}", "id": number} for number in range(100)]
    chats = tmp_path / "sums.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = client.validate({**TINY_JOB, "dataset": str(chats)}).data
    assert described is not None
    assert (described.rows, described.formats, described.unused_columns) == (100, ["prompt_completion"], ["id"])
    rows[56]["completion"] = ""
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    faulty = service.command("validate", str(spec), "--data", str(chats), "--json")
    assert faulty.returncode == 2
    (detail,) = json.loads(faulty.stderr.splitlines()[-1])["error"]["details"]
    assert (detail["param"], detail["message"]) == ("dataset", "sums.jsonl, line 57: 'completion' is empty.")
    unknown = service.command("validate", str(spec), "--set", "model.config.model_type=nonsense")
    assert (unknown.returncode, "nonsense" in unknown.stderr) == (2, True), "the worker's process is warm by now"


def test_checkpoint_saves_a_running_job_which_continues(service: Service, client: Client, endless_job: Job) -> None:
    wait_until(lambda: (client.job(endless_job.id).progress or {}).get("step"), 60, "the first step")
    saved = service.command("checkpoint", endless_job.id)
    assert (saved.returncode, "saves a checkpoint" in saved.stdout) == (0, True), saved.stderr
    wait_until(lambda: client.checkpoints(endless_job.id), 60, "the checkpoint")
    job = client.job(endless_job.id)
    assert (job.status, job.checkpoint_requested) == ("running", False)
    client.cancel(endless_job.id)
    client.wait(endless_job.id, timeout_seconds=60)
    ended = service.command("checkpoint", endless_job.id)
    assert (ended.returncode, "zeta checkpoints" in ended.stderr) == (1, True)


def test_login_stores_only_a_working_key(service: Service, tmp_path: Path) -> None:
    environment = {name: value for name, value in service.environment().items() if not name.startswith("ZETA_")}
    environment |= {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}

    def zeta(*words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ZETA, *words], env=environment, input=typed, capture_output=True, text=True, timeout=60, check=False
        )

    wrong = tmp_path / "wrong.key"
    wrong.write_text("wrong\n")
    rejected = zeta("login", service.url, "--key-file", str(wrong))
    assert rejected.returncode == 1
    assert zeta("login", service.url, typed="ключ\n").returncode == 2
    assert zeta("jobs").returncode == 4
    assert zeta("login", service.url, typed=(service.home / "admin.key").read_text()).returncode == 0
    assert zeta("login", service.url, "--key-file", str(service.home / "admin.key")).returncode == 0
    assert zeta("jobs").returncode == 0
    assert zeta("logout").returncode == 0
    assert zeta("jobs").returncode == 4


def _invalid_data(folder: Path) -> Path:
    file = folder / "not-text.jsonl"
    file.write_text('{"text": "first"}\n{"text": \n')
    return file


def _is_step(event: dict[str, Any]) -> bool:
    return event["type"] == "progress" and event.get("step") is not None


def test_a_job_starts_from_a_checkpoint_given_by_a_shortened_id(service: Service, finished_job: Job) -> None:
    of_job = ("--model", f"{finished_job.id[:-3]}/step-8")
    done = service.command("submit", *of_job, "--data", "python-docs", "--set", "max_steps=100000", "--json")
    assert done.returncode == 0, done.stderr
    started = json.loads(done.stdout)
    assert started["spec"]["model"] == {"job": finished_job.id, "checkpoint": "step-8"}
    assert service.command("cancel", started["id"]).returncode == 0
    last = service.command("submit", "--model", "@last/step-99", "--data", "python-docs")
    assert last.returncode != 0  # the checkpoint does not exist, but the id was resolved
    assert started["id"] in last.stderr


def test_a_wrong_key_exits_with_1_and_reports_the_source_of_the_key(service: Service) -> None:
    environment = service.environment() | {"ZETA_API_KEY": "wrong"}
    done = subprocess.run([ZETA, "jobs"], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "ZETA_API_KEY" in done.stderr


@pytest.mark.extended
def test_only_the_merged_model_of_an_adapter_is_downloaded(service: Service, finished_job: Job, tmp_path: Path) -> None:
    whole = service.command("download", finished_job.id, "--merged", "-o", str(tmp_path / "whole"))
    assert (whole.returncode, "without --merged" in whole.stderr) == (1, True)
    spec = tmp_path / "lora.json"
    small = {name: TINY_JOB[name] for name in ("dataset", "seq_len", "batch_size", "gradient_accumulate_every", "seed")}
    spec.write_text(json.dumps({**small, "model": {"job": finished_job.id}, "lora": {"r": 2}, "max_steps": 1}))
    assert service.command("submit", str(spec), "--follow", timeout_seconds=240).returncode == 0
    unmerged = service.command("download", "@last", "--merged", "-o", str(tmp_path / "model"))
    assert unmerged.returncode == 1
    fix = re.search(r"zeta (rerun job_\w+ --from latest --set lora.save_merged=true)", unmerged.stderr)
    assert fix is not None, unmerged.stderr
    assert service.command(*fix[1].split(), "--follow", timeout_seconds=240).returncode == 0
    files: dict[str, str] = {}
    for _ in range(2):  # the second time, all files exist and are verified
        done = service.command("download", "@last", "--merged", "-o", str(tmp_path / "model"), "--json")
        assert done.returncode == 0, done.stderr
        files = {file["path"]: file["sha256"] for file in json.loads(done.stdout)["files"]}
        assert {"config.json", "model.safetensors"} <= files.keys()
        for name, digest in files.items():
            assert hashlib.sha256((tmp_path / "model" / name).read_bytes()).hexdigest() == digest
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert (manifest["format"], {file["path"] for file in manifest["files"]}) == ("huggingface", files.keys())
    assert not (tmp_path / "model" / "adapter_config.json").exists()
