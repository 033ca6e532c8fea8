"""Warm starts with real fork servers of a small program: a forked run is like one that was started."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness.waiting import wait_until
from worker.attempt.final_line import exit_error
from worker.run import fork_server, processes
from worker.run.fork_server import ForkServerProcess, kill_left_fork_servers
from worker.run.launch import run_environment
from worker.run.process_tree import ProcessTree
from worker.run.warm_start import WarmStart
from zeta_core.contract.access import HubAccess
from zeta_core.contract.identifiers import new_id

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="warm starts need Linux")

PROGRAM = Path(__file__).with_name("forked_program.py")
REPOSITORY = Path(__file__).parents[2]
PLENTY = 2**50


def environment_of(job_id: str, **changes: str) -> dict[str, str]:
    own = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "LANG": "C.UTF-8"}  # noqa: TID251
    made = run_environment(own, job_id=job_id, attempt=1, threads=1, devices=[], hub=HubAccess.PUBLIC, job_env=())
    return {**made, "PYTHONPATH": str(REPOSITORY), **changes}


class Machine:
    """A worker's folder with its warm start, and the runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = folder / "worker.lock"
        self.lock.touch()
        self.free_bytes = PLENTY
        self.trees: list[ProcessTree] = []
        self.program = folder / "code" / "program.py"
        self.program.parent.mkdir()
        self.program.write_text(PROGRAM.read_text())
        self.command = (sys.executable, str(self.program))
        self.warm = self.new_warm_start()

    def new_warm_start(self) -> WarmStart:
        return WarmStart(
            self.command, environment_of(""), self.folder, worker_lock=self.lock, free_bytes=lambda: self.free_bytes
        )

    def wait_until_ready(self) -> psutil.Process:
        def is_ready() -> bool:
            self.warm.step(is_idle=True)
            return self.warm.is_ready

        wait_until(is_ready, 60, "the fork server to be ready")
        assert self.warm.process_id is not None
        return psutil.Process(self.warm.process_id)

    def new_run(self) -> ProcessTree:
        job_id = new_id("job")
        directory = self.folder / "workers" / "w" / "runs" / job_id / "attempt-1"
        directory.mkdir(parents=True)
        made = ProcessTree(directory, job_id, 1, 1.0)
        self.trees.append(made)
        return made

    def start(self, tree: ProcessTree, *, warm: bool = True, **changes: str) -> psutil.Process:
        """Start it as the supervisor does, and return its first process when it runs."""

        def is_started() -> bool:
            self.warm.step(is_idle=False)
            environment = environment_of(tree.job_id, **changes)
            return tree.start(self.command, environment, self.warm if warm else None)

        wait_until(is_started, 60, "the run to be started")
        wait_until((tree.directory / "facts.json").exists, 60, "the program to run")
        (process,) = tree.processes.alive()
        return process

    def end(self, tree: ProcessTree, status: int | None = 0) -> int | None:
        """Let it exit with ``status``, if any, and return the exit status that the worker sees."""
        if status is not None:
            (tree.directory / "exit.new").write_text(str(status))
            (tree.directory / "exit.new").rename(tree.directory / "exit")

        def is_gone() -> bool:
            self.warm.step(is_idle=False)
            return tree.is_gone(has_ended=False, can_save=True)

        wait_until(is_gone, 60, "the run to be gone")
        return tree.exit_status


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.warm.stop()
    for tree in made.trees:
        tree.kill()
    kill_left_fork_servers(fork_server.mark_of(made.lock))


def facts_of(tree: ProcessTree) -> Any:
    """What the process found, without what differs between any two runs."""
    text = (tree.directory / "facts.json").read_text()
    mark = processes.run_mark(tree.directory)
    text = text.replace(str(tree.directory), "RUN_DIR").replace(tree.job_id, "JOB").replace(mark, "MARK")
    return json.loads(text)


def was_forked(process: psutil.Process, server: psutil.Process) -> bool:
    return process.ppid() == server.pid


def test_a_forked_run_has_everything_that_a_started_one_has(machine: Machine) -> None:
    server = machine.wait_until_ready()
    started, forked = machine.new_run(), machine.new_run()
    before = os.umask(0o027)  # after the fork server was started
    os.sched_setaffinity(0, cpus := sorted(os.sched_getaffinity(0))[:1])
    try:
        cold, warm = machine.start(started, warm=False), machine.start(forked)
        assert not was_forked(cold, server)
        assert was_forked(warm, server)
        assert facts_of(forked) == facts_of(started)
        facts = facts_of(forked)
        assert facts["environment"]["ZETA_JOB_ID"] == "JOB"
        assert facts["environment"]["ZETA_RUN"] == "MARK"
        assert "ZETA_FORK_SERVER" not in facts["environment"]
        assert (facts["cpus"], facts["status"]["Umask"], facts["arguments"]) == (cpus, "0027", ["RUN_DIR"])
        assert (forked.directory / "train.log").read_text() == "the program runs\n"
        assert not processes.is_unlocked(forked.directory)
        # What other programs see of it.
        assert "ZETA_FORK_SERVER" not in warm.environ()
        assert warm.cmdline()[-1:] != ["fork-server"]
        assert str(forked.directory) in warm.cmdline()
        assert [process.pid for process in forked.processes.alive()] == [warm.pid]
    finally:
        os.umask(before)
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    assert (machine.end(started), machine.end(forked)) == (0, 0)
    assert processes.is_unlocked(forked.directory)


def test_the_worker_sees_exit_codes_and_signals_of_forked_runs(machine: Machine) -> None:
    machine.wait_until_ready()
    one, two, three = (machine.new_run() for _ in range(3))
    machine.start(one)
    killed = machine.start(two)
    stopped = machine.start(three)
    assert machine.end(one, 7) == 7
    killed.kill()
    assert machine.end(two, None) == -signal.SIGKILL
    stopped.terminate()
    assert machine.end(three, None) == 15, "its own handler ran"


def test_a_killed_fork_server_leaves_its_runs_running_and_is_replaced(machine: Machine) -> None:
    server = machine.wait_until_ready()
    finishes, fails = machine.new_run(), machine.new_run()
    process = machine.start(finishes)
    machine.start(fails)
    server.kill()
    wait_until(lambda: machine.warm.step(is_idle=False) or not machine.warm.is_ready, 30, "its end to be noticed")
    assert processes.is_alive(process)
    assert [found.pid for found in finishes.processes.alive()] == [process.pid]
    assert machine.end(finishes, 0) is None
    assert machine.end(fails, 3) is None
    error = exit_error(fails, has_journal=True)
    assert (error.code, "fork server" in error.message) == ("process_killed", True)
    later = machine.new_run()
    cold = machine.start(later)
    assert cold.ppid() == os.getpid(), "meanwhile, runs start cold"
    assert machine.end(later, 5) == 5


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_request_to_a_dying_fork_server_starts_the_run_once(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    monkeypatch.setattr(fork_server, "ANSWER_SECONDS", 0.5)
    server = machine.wait_until_ready()
    if is_stopped:
        server.suspend()
    tree = machine.new_run()
    environment = environment_of(tree.job_id)
    assert not tree.start(machine.command, environment, machine.warm)
    assert not processes.is_unlocked(tree.directory), "the request holds the lock"
    if not is_stopped:
        server.kill()
    process = machine.start(tree)  # by this process, or by the fork server before it was killed
    assert [found.pid for found in tree.processes.alive()] == [process.pid]
    assert machine.end(tree, 4) in (4, None)


def test_a_stopped_fork_server_of_an_earlier_worker_is_killed(machine: Machine) -> None:
    server = machine.wait_until_ready()
    tree = machine.new_run()
    process = machine.start(tree)
    server.suspend()
    machine.new_warm_start()  # of the next process of this worker
    wait_until(lambda: not processes.is_alive(server), 30, "the fork server to be gone")
    assert processes.is_alive(process)
    assert machine.end(tree, 0) is None


def test_a_fork_server_ends_with_its_worker_and_its_runs_do_not(machine: Machine) -> None:
    server = machine.wait_until_ready()
    tree = machine.new_run()
    process = machine.start(tree)
    machine.warm.stop()  # closes the socket, as the end of the process does
    wait_until(lambda: not processes.is_alive(server), 30, "the fork server to be gone")
    assert processes.is_alive(process)
    adopted = ProcessTree(tree.directory, tree.job_id, 1, 1.0)
    adopted.adopt()
    assert not adopted.is_gone(has_ended=False, can_save=True)
    machine.end(tree, 0)
    wait_until(lambda: adopted.is_gone(has_ended=False, can_save=True), 30, "its end")


@pytest.mark.extended
def test_changed_code_is_not_forked_and_the_fork_server_is_replaced(machine: Machine) -> None:
    server = machine.wait_until_ready()
    running = machine.new_run()
    machine.start(running)
    machine.program.write_text(machine.program.read_text().replace("the program runs", "the new program runs"))
    changed = machine.new_run()
    cold = machine.start(changed)
    assert cold.ppid() == os.getpid()
    assert (changed.directory / "train.log").read_text() == "the new program runs\n"
    replaced = machine.wait_until_ready()
    assert replaced.pid != server.pid
    assert machine.end(running, 9) == 9, "the old fork server still reports its runs"
    wait_until(lambda: machine.warm.step(is_idle=False) or not processes.is_alive(server), 30, "its exit")
    warm = machine.new_run()
    assert was_forked(machine.start(warm), replaced)
    assert (warm.directory / "train.log").read_text() == "the new program runs\n"
    machine.end(warm)
    machine.end(changed)


@pytest.mark.extended
def test_the_fork_server_is_released_when_memory_runs_out(machine: Machine) -> None:
    server = machine.wait_until_ready()
    machine.free_bytes = 0
    wait_until(lambda: machine.warm.step(is_idle=True) or not processes.is_alive(server), 30, "its exit")
    assert machine.warm.process_id is None
    machine.free_bytes = PLENTY
    assert machine.wait_until_ready().pid != server.pid


def test_a_run_with_another_environment_starts_cold(machine: Machine) -> None:
    machine.wait_until_ready()
    tree = machine.new_run()
    process = machine.start(tree, OMP_NUM_THREADS="3")
    assert process.ppid() == os.getpid()
    assert facts_of(tree)["environment"]["OMP_NUM_THREADS"] == "3"
    machine.end(tree)


@pytest.mark.extended
def test_a_fork_server_that_fails_is_tried_again_later(
    machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = machine.program.read_text()
    machine.program.write_text("import sys; sys.exit(3)")
    monkeypatch.setattr("worker.run.warm_start.PAUSE_SECONDS", 0.2)
    machine.warm = machine.new_warm_start()
    wait_until(lambda: machine.warm.step(is_idle=True) or "exited with status 3" in caplog.text, 30, "its failure")
    machine.program.write_text(works)
    machine.wait_until_ready()


def test_a_request_that_cannot_be_fulfilled_is_refused_and_starts_cold(machine: Machine) -> None:
    server = ForkServerProcess(machine.command, environment_of(""), machine.folder, "mark")
    try:
        wait_until(lambda: server.step() or server.can_fork, 30, "the fork server to be ready")
        tree = machine.new_run()
        environment = environment_of(tree.job_id)
        del environment["ZETA_ATTEMPT"]
        fork = server.fork(tree.directory, environment)
        assert fork is not None
        wait_until(lambda: server.step() or fork.refusal, 30, "its refusal")
        assert "KeyError" in str(fork.refusal)
        assert processes.is_unlocked(tree.directory)
        assert not tree.processes.alive()
    finally:
        server.kill()
