"""What runs and checks may access, and that a real check and a real run work within that."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.specs import TINY_LLAMA, tiny_job
from tests.harness.fleet import SmallFleet
from worker.attempt.run_file import new_run_file
from worker.checks.process import CheckProcess
from worker.run.sandbox import Sandboxes, SandboxInputs
from worker.settings import WorkerSettings
from zeta_core.contract.access import HubAccess
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.job.check import CheckAnswer
from zeta_core.contract.job.data_preview import RowSelection
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.wire.messages import CheckRequest, Dispatch
from zeta_core.contract.wire.run_directory import RUN_FILE, checkpoint_key, file_key, project_cache
from zeta_core.contract.wire.sandbox import SANDBOX_FILE, SandboxFile
from zeta_core.system.sandbox import SandboxSupport, restrict

JOB, BASE, STRANGER = (f"job_01m8p5r6jh0w20dn2jb92x1{end}" for end in "def")
FILE, TOKENIZER = "file_01m8p5r6jh0w20dn2jb92x1d", "file_01m8p5r6jh0w20dn2jb92x1e"
MAX_ENTER_SECONDS = 0.02
NUM_TRIES = 10
pytestmark = pytest.mark.timeout(300)


def worker_settings(tmp_path: Path, **values: object) -> WorkerSettings:
    return WorkerSettings.model_validate(
        {"home": tmp_path / "home", "worker_secret": "s", "worker_name": "w", **values}
    )


def inputs_of(
    spec: dict[str, Any], settings: WorkerSettings, kind: JobKind = JobKind.TRAINING, *, bases: Sequence[str] = ()
) -> SandboxInputs:
    """The inputs of a spec whose artifacts are in a folder."""
    return SandboxInputs.of_spec(spec, settings, settings.artifacts.joinpath, kind, bases=bases)


def test_a_spec_allows_its_files_and_the_bases_that_the_server_names(tmp_path: Path) -> None:
    """The base that the adapter names was written by a run, which may have been taken over."""
    settings = worker_settings(tmp_path, data_root=tmp_path / "data")
    adapter = settings.artifacts / checkpoint_key(JOB, "final")
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"{STRANGER}/final"}))
    bases = [f"{BASE}/best", TOKENIZER, "org/model", "../../etc", f"{BASE}/../secret"]
    spec = {
        "model": {"job": JOB},
        "tokenizer": {"file": TOKENIZER},
        "dataset": [{"file": FILE}, {"path": "corpus/*.txt"}],
        "metadata": {"file": "file_of_another_project"},
    }
    assert set(inputs_of(spec, settings, bases=bases).paths) == {
        adapter,
        settings.artifacts / checkpoint_key(BASE, "best"),
        settings.artifacts / file_key(FILE),
        settings.artifacts / file_key(TOKENIZER),
        tmp_path / "data",
    }
    assert inputs_of({**spec, "model": {"pickle": "x"}}, settings).paths == (), "the run reports the error"


def test_a_preview_allows_its_data_although_it_has_no_model(tmp_path: Path) -> None:
    settings, upload = worker_settings(tmp_path), "file_01m00000000000000000000000"
    request = CheckRequest(
        check_id="a",
        spec={"dataset": {"file": upload}},
        resolved_spec=ResolvedSpec(),
        limit_seconds=10,
        shown=RowSelection(rows=1),
    )
    assert SandboxInputs.of_check(request, settings, settings.artifacts.joinpath).paths == (
        settings.artifacts / file_key(upload),
    )


def test_a_batch_allows_its_model_and_the_file_of_its_requests(tmp_path: Path) -> None:
    settings = worker_settings(tmp_path)
    spec = {"model": {"job": JOB}, "model_name": "m", "fingerprint": "f", "has_manifest": True, "input": {"file": FILE}}
    spec |= {"endpoint": "/v1/chat/completions", "num_requests": 1}
    assert set(inputs_of(spec, settings, JobKind.BATCH).paths) == {
        settings.artifacts / checkpoint_key(JOB, "final"),
        settings.artifacts / file_key(FILE),
    }


def test_an_evaluation_allows_its_models_and_its_file(tmp_path: Path) -> None:
    settings = worker_settings(tmp_path)
    spec = {"model": {"job": JOB}, "fingerprint": "f", "base": {"job": BASE}, "dataset": {"file": FILE}, "seq_len": 64}
    assert set(inputs_of(spec, settings, JobKind.EVALUATION).paths) == {
        settings.artifacts / checkpoint_key(JOB, "final"),
        settings.artifacts / checkpoint_key(BASE, "final"),
        settings.artifacts / file_key(FILE),
    }


def test_an_export_allows_its_checkpoint_and_the_held_out_data_of_the_job(tmp_path: Path) -> None:
    settings = worker_settings(tmp_path)
    spec = {"model": {"job": JOB}, "to": "merged"}
    for held_out, files in (({"dataset": {"file": FILE}}, {file_key(FILE)}), ({"dataset": 1}, set()), (None, set())):
        found = SandboxInputs.of_spec(spec, settings, settings.artifacts.joinpath, JobKind.EXPORT, held_out=held_out)
        keys = {checkpoint_key(JOB, "final"), *files}
        assert set(found.paths) == {settings.artifacts / key for key in keys}


def test_a_data_root_that_contains_the_home_does_not_expose_it(tmp_path: Path) -> None:
    settings = worker_settings(tmp_path, data_root=tmp_path)
    spec = {"model": {"config": TINY_LLAMA}, "dataset": {"path": "corpus/*.txt"}}
    assert inputs_of(spec, settings).paths == (tmp_path / "corpus",)
    (tmp_path / "corpus").mkdir()
    settings.home.mkdir()
    (tmp_path / "link").symlink_to(settings.home)
    everything = {**spec, "dataset": {"path": "*/a.txt"}}
    assert inputs_of(everything, settings) == SandboxInputs((tmp_path / "corpus",), listed=(tmp_path,))
    for inside in ("home/admin.key", "home/*.txt", "link/admin.key"):
        assert inputs_of({**spec, "dataset": {"path": inside}}, settings).paths == ()


def test_projects_have_caches_of_their_own_and_trackers_keep_the_network(tmp_path: Path) -> None:
    support = SandboxSupport(landlock=7, namespaces=True)
    files = list[SandboxFile]()
    for project, job_env in (("one", ()), ("two", ("WANDB_API_KEY",))):
        directory = tmp_path / project
        directory.mkdir()
        sandboxes = Sandboxes(worker_settings(tmp_path, job_env=job_env), support)
        sandboxes.prepare(directory, inputs=SandboxInputs(), project=project, hub=HubAccess.OFF)
        files.append(SandboxFile.model_validate_json((directory / SANDBOX_FILE).read_bytes()))
    one, two = files
    assert not set(one.writable) & set(two.writable)
    assert [one.network, two.network] == [False, True]
    assert not any(path.startswith(str(tmp_path)) for path in one.readable)


def test_projects_share_no_environment_and_only_exports_to_gguf_have_the_network(tmp_path: Path) -> None:
    sandboxes = Sandboxes(worker_settings(tmp_path), SandboxSupport(landlock=7, namespaces=True))
    environments = list[str]()
    for project, to, network in (("one", "gguf", True), ("two", "gguf", True), ("two", "merged", False)):
        message = Dispatch(
            job_id=JOB,
            attempt=1,
            worker="w",
            slots=[0],
            project=project,
            job_kind=JobKind.EXPORT,
            spec={"model": {"job": JOB}, "to": to},
        )
        directory = tmp_path / f"{project}-{to}"
        directory.mkdir()
        run_file = new_run_file(message, sandboxes.settings)
        sandboxes.prepare_run(directory, run_file, SandboxInputs(), ())
        file = SandboxFile.model_validate_json((directory / SANDBOX_FILE).read_bytes())
        assert file.network == network
        environments += {str(run_file.environments_dir)} & set(file.writable)
    assert len(environments) == len(set(environments)) == 2
    assert not Path(environments[0]).is_relative_to(environments[1])


def test_compiled_extensions_are_copied_into_a_cache_but_never_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may replace folders of its project's cache by symbolic links to folders of others."""
    monkeypatch.setenv("HOME", str(tmp_path / "operator"))
    (tmp_path / "operator/.cache/torch_extensions").mkdir(parents=True)
    (tmp_path / "operator/.cache/torch_extensions/adam.so").write_text("compiled")
    sandboxes = Sandboxes(worker_settings(tmp_path), SandboxSupport(landlock=7, namespaces=True))
    for project in ("honest", "hostile"):
        home = sandboxes.settings.root / project_cache(project) / "home"
        home.mkdir(parents=True)
        if project == "hostile":
            (tmp_path / "others").mkdir()
            (home / ".cache").symlink_to(tmp_path / "others")
        message = Dispatch(job_id=JOB, attempt=1, worker="w", slots=[0], project=project, spec={"use_deepspeed": True})
        directory = tmp_path / project
        directory.mkdir()
        sandboxes.prepare_run(directory, new_run_file(message, sandboxes.settings), SandboxInputs(), ())
    copied = sandboxes.settings.root / project_cache("honest") / "home/.cache/torch_extensions/adam.so"
    assert copied.read_text() == "compiled"
    assert list((tmp_path / "others").iterdir()) == []
    assert not list(sandboxes.settings.root.glob(".extensions-*"))


def test_the_operators_environment_for_gguf_is_readable(tmp_path: Path) -> None:
    def readable(python: Path) -> set[str]:
        sandboxes = Sandboxes(worker_settings(tmp_path, gguf_python=python), SandboxSupport(landlock=7))
        sandboxes.prepare(tmp_path, inputs=SandboxInputs(), project="p", hub=HubAccess.OFF)
        return set(SandboxFile.model_validate_json((tmp_path / SANDBOX_FILE).read_bytes()).readable)

    python, interpreter = (tmp_path / name / "bin" / "python" for name in ("gguf", "installed"))
    for file in (python, interpreter):
        file.parent.mkdir(parents=True)
    interpreter.touch()
    python.symlink_to(interpreter)
    assert {str(tmp_path / "gguf"), str(tmp_path / "installed")} <= readable(python)
    (tmp_path / "bin").mkdir()
    assert str(tmp_path) not in readable(tmp_path / "bin" / "python"), "it contains the home of the service"


def test_settings_of_the_sandbox_are_checked() -> None:
    for variable, value in (("ZETA_SANDBOX", "yes"), ("ZETA_SANDBOX_READ", "relative/folder")):
        with pytest.raises(InvalidSettings, match=variable):
            WorkerSettings.from_environment({"ZETA_WORKER_SECRET": "s", variable: value})


def test_a_check_reads_only_the_files_of_its_spec(tmp_path: Path, sandbox_support: SandboxSupport) -> None:
    """The second check names an upload that exists, but that its sandbox does not contain."""
    settings = worker_settings(tmp_path)
    upload = settings.artifacts / file_key(FILE)
    upload.parent.mkdir(parents=True)
    upload.write_text("text " * 100)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    process = CheckProcess((sys.executable, "-m", "zeta_core"), environment, tmp_path, memory_bytes=4 << 30)
    answers = list[CheckAnswer]()
    try:
        for number, inputs in enumerate((SandboxInputs((upload,)), SandboxInputs())):
            directory = tmp_path / f"check-{number}"
            directory.mkdir()
            Sandboxes(settings, sandbox_support).prepare(
                directory, inputs=inputs, project="default", hub=HubAccess.OFF, may_remove=True
            )
            files = {FILE: {"filename": "a.txt", "bytes": upload.stat().st_size}}
            spec = {"model": {"config": TINY_LLAMA}, "dataset": {"file": FILE}, "max_steps": 1}
            run = {"spec": spec, "artifacts_root": str(settings.artifacts), "resolved_spec": {"files": files}}
            (directory / RUN_FILE).write_text(json.dumps(run))
            answers.append(CheckAnswer.model_validate_json(process.check(directory / RUN_FILE, limit_seconds=200)))
    finally:
        process.end()
    assert [answer.ok for answer in answers] == [True, False], answers
    assert "Permission denied" in answers[1].details[0].message


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"report_to": ["tensorboard"]}, {"resources": {"processes": 2}}])
def test_a_real_run_works_in_its_sandbox(
    fleet: SmallFleet, sandbox_support: SandboxSupport, options: dict[str, Any]
) -> None:
    """In one process, and in two that connect through their own loopback interface."""
    fleet.start_worker(small=False, ZETA_WORKER_SLOTS="2", ZETA_SANDBOX="required")
    job_id = fleet.submit(spec=tiny_job(max_steps=4, checkpointing_steps=2, **options))
    fleet.wait_for_status(job_id, "succeeded", 200)
    (run,) = fleet.settings.home.glob(f"workers/*/runs/{job_id}/attempt-1")
    assert (run / SANDBOX_FILE).exists()


@pytest.mark.slow
def test_a_run_that_writes_a_file_above_its_limit_fails_once_with_the_setting(
    fleet: SmallFleet, sandbox_support: SandboxSupport
) -> None:
    fleet.start_worker(small=False, ZETA_SANDBOX="required", ZETA_JOB_FILE_BYTES=str(2**20))
    model = {"config": {**TINY_LLAMA, "vocab_size": 16_384}}
    job_id = fleet.submit(spec=tiny_job(model=model, max_steps=1))
    job = fleet.wait_for_status(job_id, "failed", 200)
    assert job.error is not None
    assert (job.error["code"], job.attempt) == ("file_limit", 1), fleet.logs()
    assert "a larger ZETA_JOB_FILE_BYTES on the worker" in job.error["hint"]


def test_entering_the_sandbox_takes_milliseconds(tmp_path: Path, sandbox_support: SandboxSupport) -> None:
    """The processor time of the fastest of several processes, because others may use the processor."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    sandboxes = Sandboxes(worker_settings(tmp_path), sandbox_support)
    sandboxes.prepare(tmp_path / "run", inputs=SandboxInputs(), project="default", hub=HubAccess.OFF)
    file = SandboxFile.model_validate_json((tmp_path / "run" / SANDBOX_FILE).read_bytes())
    assert min(seconds_to_enter(file) for _ in range(NUM_TRIES)) < MAX_ENTER_SECONDS


def seconds_to_enter(file: SandboxFile) -> float:
    result, outcome = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            begun = time.process_time()
            restrict(file)
            os.write(outcome, str(time.process_time() - begun).encode())
        finally:
            os._exit(0)
    os.close(outcome)
    with os.fdopen(result) as stream:
        seconds = stream.read()
    os.waitpid(pid, 0)
    return float(seconds)
