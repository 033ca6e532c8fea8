"""Runs on two nodes, each with folders of its own: the same results as on one host, and one node that fails."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.harness.namespaces import Namespaces
from tests.harness.waiting import wait_until
from tests.zeta_core.node_runs import ADDRESSES, logs, make_node_runs, run_nodes, start_nodes
from tests.zeta_core.parallel.test_parallel import why_no_deepspeed
from tests.zeta_core.run_directories import end_of, journal, make_run, start
from zeta_core.contract.job.events import LogLine, ProgressLine

ENDLESS = {"max_steps": 100_000, "checkpointing_steps": 100_000}


def weights(output: Path) -> bytes:
    return (output / "final" / "model.safetensors").read_bytes()


def losses(run: Path) -> dict[int, float]:
    """The reported losses of a run, by step."""
    lines = [line for line in journal(run) if isinstance(line, ProgressLine)]
    return {line.step: line.loss for line in lines if line.step is not None and line.loss is not None}


def has_steps(run: Path) -> bool:
    return bool(losses(run))


def start_endless(folder: Path, *, processes: int = 1) -> tuple[list[Path], list[subprocess.Popen[bytes]]]:
    """Start a run on two nodes that does not end by itself, and wait until both have made a step."""
    runs = make_node_runs(folder, spec=ENDLESS, processes=processes)
    started = start_nodes(runs)
    wait_until(lambda: all(map(has_steps, runs)), 200, "the first step")
    return runs, started


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param({"use_fsdp": True}, id="fsdp2", marks=pytest.mark.extended),
        pytest.param({}, id="ddp", marks=pytest.mark.slow),
        pytest.param({"use_deepspeed": 2}, id="zero-2", marks=pytest.mark.slow),
    ],
)
def test_two_nodes_of_two_processes_give_the_bits_of_one_host(tmp_path: Path, strategy: dict[str, Any]) -> None:
    if "use_deepspeed" in strategy and (reason := why_no_deepspeed()):
        pytest.skip(reason)
    spec = {**strategy, "max_steps": 3}
    one = make_run(tmp_path / "one", spec=spec, processes=4)
    assert start(one).wait(timeout=280) == 0, (one / "train.log").read_text()[-3000:]
    runs = make_node_runs(tmp_path, spec=spec, processes=2)
    assert run_nodes(runs) == [0, 0], logs(runs)
    assert [end_of(run).status for run in runs] == ["succeeded", "succeeded"]
    assert weights(tmp_path / "node-0" / "output") == weights(tmp_path / "one" / "output")
    files = {
        folder: sorted(path.name for path in (tmp_path / folder / "output" / "final" / "training_state").rglob("*"))
        for folder in ("one", "node-0")
    }
    assert files["node-0"] == files["one"]
    assert list((tmp_path / "node-1" / "output").iterdir()) == []  # its shards were sent to node 0
    messages = [line.message for line in journal(runs[0]) if isinstance(line, LogLine)]
    assert any(message.startswith("All 2 nodes can connect to each other: median latency") for message in messages)
    assert any(message.startswith("An all-reduce over 4 processes on 2 nodes takes") for message in messages)
    assert losses(runs[1]).keys() == losses(runs[0]).keys()  # its own worker sees the progress


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_then_two_then_four_processes_train_the_same_sequences(tmp_path: Path) -> None:
    spec = {"use_fsdp": True, "lr_scheduler": "constant", "checkpointing_steps": 100, "gradient_accumulate_every": 2}
    straight = make_run(tmp_path / "straight", spec={**spec, "max_steps": 6}, processes=4)
    assert start(straight).wait(timeout=280) == 0, (straight / "train.log").read_text()[-3000:]
    runs: list[Path] = []
    before: Path | None = None
    for part, nodes in enumerate((2, 1, 2)):
        folder = tmp_path / f"part-{part}"
        fields: dict[str, Any] = {"spec": {**spec, "max_steps": 2 * part + 2}, "processes": 2}
        outputs = [folder / (f"node-{node}" if nodes > 1 else "one") / "output" for node in range(nodes)]
        if before is not None:  # each node has a copy, as its worker fetches it from the store
            for output in outputs:
                shutil.copytree(before, output / before.name)
        if nodes == 1:
            resume = None if before is None else str(outputs[0] / before.name)
            runs = [make_run(folder / "one", resume_from=resume, **fields)]
        else:
            runs = make_node_runs(folder, **fields)
            for run, output in zip(runs, outputs, strict=True):
                if before is not None:
                    set_resume_point(run, output / before.name)
        assert run_nodes(runs) == [0] * nodes, logs(runs)
        before = outputs[0] / "final"
    found, expected = end_of(runs[0]).result, end_of(straight).result
    assert found is not None
    assert expected is not None
    assert found.tokens == expected.tokens
    assert found.train_loss == pytest.approx(expected.train_loss, abs=1e-6)  # the mean over all steps of all parts
    assert before is not None
    trained = load_file(before / "model.safetensors")
    for name, tensor in load_file(tmp_path / "straight" / "output" / "final" / "model.safetensors").items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-5, rtol=1e-4)


def set_resume_point(run: Path, checkpoint: Path) -> None:
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.removesuffix("}") + f', "resume_from": "{checkpoint}"}}')


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_rank_ends_all_nodes_and_is_named(tmp_path: Path) -> None:
    runs, processes = start_endless(tmp_path, processes=2)
    ranks = [child for child in psutil.Process(processes[1].pid).children() if child.environ().get("RANK") == "3"]
    ranks[0].kill()
    assert [process.wait(timeout=90) for process in processes] == [1, 1]
    for run in runs:
        end = end_of(run)
        assert (end.status, end.reason) == ("failed", "process_killed"), logs(runs)
        assert end.error is not None
        assert end.error.message == f"Node 1 ({ADDRESSES[1]}): Rank 3 was killed by SIGKILL from outside."
        assert (end.error.evidence.rank, end.error.evidence.node, end.error.evidence.signal) == (3, 1, "SIGKILL")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_node_ends_the_other_one_with_its_stacks(tmp_path: Path, frozen: int) -> None:
    runs, processes = start_endless(tmp_path)
    node = psutil.Process(processes[frozen].pid)
    members = [node, *node.children(recursive=True)]
    for member in members:
        member.suspend()
    other = 1 - frozen
    try:
        assert processes[other].wait(timeout=90) == 1
        end = end_of(runs[other])
        assert (end.status, end.reason) == ("failed", "node_lost"), logs(runs)
        assert end.error is not None
        assert end.error.evidence.node == frozen
        assert f"Node {frozen} ({ADDRESSES[frozen]}) did not respond to the other nodes for 30 s." in end.error.message
        assert "Current thread" in (runs[other] / "train.log").read_text()
    finally:
        for member in members:
            member.send_signal(signal.SIGCONT)
    assert processes[frozen].wait(timeout=90) == 1  # when it continues, it ends as well
    assert end_of(runs[frozen]).status == "failed"
    wait_until(lambda: not any(member.is_running() for member in members), 30, "the end of all processes")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", [0, 1])
def test_a_node_whose_processes_are_all_killed_is_lost(tmp_path: Path, killed: int) -> None:
    runs, processes = start_endless(tmp_path)
    node = psutil.Process(processes[killed].pid)
    for member in [node, *node.children(recursive=True)]:
        member.kill()
    assert processes[1 - killed].wait(timeout=90) == 1
    end = end_of(runs[1 - killed])
    assert (end.status, end.reason) == ("failed", "node_lost"), logs(runs)
    assert end.error is not None
    assert end.error.evidence.node == killed


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stopped_node_lets_all_nodes_save_and_hand_the_job_back(tmp_path: Path) -> None:
    runs, processes = start_endless(tmp_path)
    (runs[1] / "stop").write_text('{"action": "hand_back"}')
    assert [process.wait(timeout=90) for process in processes] == [0, 0]
    assert [(end_of(run).status, end_of(run).reason) for run in runs] == [("queued", "handed_back")] * 2
    assert list((tmp_path / "node-0" / "output").glob("step-*/manifest.json"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nodes_in_network_namespaces_train_and_one_that_is_cut_off_is_lost(
    tmp_path: Path, namespaces: Namespaces
) -> None:
    runs = make_node_runs(tmp_path, spec=ENDLESS, processes=1, addresses=namespaces.addresses[:2])
    processes = [
        start(run, *namespaces.command(host), sys.executable, "-m", "zeta_core") for host, run in enumerate(runs)
    ]
    wait_until(lambda: all(map(has_steps, runs)), 200, "the first step")
    namespaces.cut(1)
    try:
        assert [process.wait(timeout=120) for process in processes] == [1, 1]
    finally:
        namespaces.restore(1)
    assert [end_of(run).reason for run in runs] == ["node_lost", "node_lost"], logs(runs)
