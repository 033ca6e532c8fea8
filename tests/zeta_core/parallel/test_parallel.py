"""Several processes over gloo: every strategy trains the same model, really shards it, and resumes exactly.

One launch checks several things, because starting the processes takes longer than the training.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import safe_open

from tests.harness.waiting import wait_until
from tests.zeta_core.run_directories import ROOT, end_of, journal, make_run, start

SCRIPT = Path(__file__).with_name("parallel_script.py")


def why_no_deepspeed() -> str | None:
    """The reason why DeepSpeed cannot run, or ``None``. On a CPU, it compiles its communication at the first use."""
    if shutil.which("g++") is None:
        return "DeepSpeed on a CPU needs a C++ compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "DeepSpeed on a CPU needs Python's headers"
    try:
        import deepspeed as deepspeed
    except ImportError:
        return "DeepSpeed is not installed"
    return None


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ZETA_HOME": str(folder / "home")}  # noqa: TID251


def launch(folder: Path, processes: int, cases: list[dict[str, Any]]) -> subprocess.Popen[bytes]:
    words = [str(SCRIPT), str(folder / "results.json"), *(json.dumps(case) for case in cases)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        *words,
    ]
    if processes == 1:
        command = [sys.executable, *words]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=log)


def results(folder: Path, processes: int, cases: list[dict[str, Any]]) -> dict[str, Any]:
    assert launch(folder, processes, cases).wait(timeout=280) == 0, (folder / "log.txt").read_text()[-3000:]
    return json.loads((folder / "results.json").read_text())


def case(name: str, *, world: int, model: str = "plain", steps: int = 5, **more: Any) -> dict[str, Any]:
    """A case with a global batch of 12 sequences for any number of processes."""
    split = {"batch_size": 3, "gradient_accumulate_every": 4 // world}
    return {"name": name, "model": model, "output_dir": name, "max_steps": steps, **split, **more}


@pytest.mark.extended
@pytest.mark.timeout(300)
def test_every_strategy_trains_the_same_as_one_process(tmp_path: Path) -> None:
    strategies: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"use_fsdp": True}}
    strategies["fsdp2-recomputing"] = {"use_fsdp": True, "use_activation_checkpointing": True}
    if why_no_deepspeed() is None:
        strategies |= {f"zero-{stage}": {"use_deepspeed": stage} for stage in (1, 2, 3)}
    optimizers: dict[str, dict[str, Any]] = {
        f"{name} {optimizer}": {**strategies[name], "optimizer": optimizer}
        for name, optimizer in (
            ("ddp", "muon"),
            ("fsdp2", "muon"),
            ("fsdp2", "lion"),
            ("fsdp2", "sgd"),
            ("zero-2", "lion"),
        )
        if name in strategies
    }
    for model, cases in (("plain", strategies | optimizers), ("tied llama", strategies)):
        folder = tmp_path / model
        folder.mkdir()
        used = sorted({str(more.get("optimizer", "adamw")) for more in cases.values()})
        once = [case(name, world=1, model=model, optimizer=name) for name in used]
        twice = [case(name, world=2, model=model, **more) for name, more in cases.items()]
        if model == "plain":
            # Also a model with unused parameters, and several uses of DeepSpeed in one process.
            once += [case(f"alone {name}", world=1, **strategies[name]) for name in strategies if name > "zero-1"]
            once.append(case("skipping", world=1, model="skipping"))
            twice.append(case("ddp skipping", world=2, model="skipping"))
        alone = results(folder, 1, once)
        found = results(folder, 2, twice)
        for name, result in [*found.items(), *((name, alone[name]) for name in alone if name.startswith("alone"))]:
            expected = alone["skipping" if "skipping" in name else cases.get(name, {}).get("optimizer", "adamw")]
            assert result["loss"] == pytest.approx(expected["loss"], abs=1e-5), name
            assert result["weight"] == pytest.approx(expected["weight"], rel=1e-5), name
    # The file of each rank contains half of the rows of every matrix.
    shards = sorted((tmp_path / "plain" / "fsdp2" / "final" / "training_state").glob("optimizer-*.safetensors"))
    assert len(shards) == 2
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            assert file.get_slice("embedding.weight/exp_avg").get_shape() == [192, 16]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_at_random_moments_several_processes_end_with_the_same_bits(tmp_path: Path) -> None:
    strategies: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"use_fsdp": True}}
    if why_no_deepspeed() is None:
        strategies["zero-2"] = {"use_deepspeed": 2}
    cases = {
        name: case(name, world=2, model="dropout", steps=40, checkpointing_steps=3, **more)
        for name, more in strategies.items()
    }
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        folder.mkdir()
    results(straight, 2, list(cases.values()))
    for name in cases:
        process = launch(killed, 2, [cases[name]])
        output_dir = killed / name
        wait_until(lambda at=output_dir: len(list(at.glob("step-*/manifest.json"))) >= 2, 100, "two checkpoints")
        for rank in _children(process.pid):
            os.kill(rank, 9)
        process.wait(timeout=60)
        assert not (output_dir / "final").exists()
    found = results(killed, 2, [{**one, "resume_from_checkpoint": name} for name, one in cases.items()])
    for name in cases:
        assert 0 < found[name]["steps_trained"] < 40
        files = [(folder / name / "final" / "model.safetensors").read_bytes() for folder in (straight, killed)]
        assert files[0] == files[1], name


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.extended
@pytest.mark.timeout(300)
def test_weights_in_bf16_are_trained_and_resumed_on_other_numbers_of_processes(tmp_path: Path) -> None:
    strategies: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"use_fsdp": True}}
    common: dict[str, Any] = {"lr_scheduler": "constant", "mixed_precision": "bf16"}
    settings = {
        f"{name} {how}": {**more, **common, "bf16_weights": how, "optimizer_states": states}
        for name, more in strategies.items()
        for how, states in (("kahan", "bf16"), ("stochastic", "8bit"))
    }
    reference = results(tmp_path, 1, [case("float32", world=1, steps=6, **common)])["float32"]
    results(tmp_path, 2, [case(name, world=2, steps=3, **more) for name, more in settings.items()])
    for name, more in settings.items():
        settings[name] = {**more, "resume_from_checkpoint": name}
    found = results(tmp_path, 1, [case(name, world=1, steps=6, **more) for name, more in settings.items()])
    for name, result in found.items():
        assert result["steps_trained"] == 3, name
        assert result["loss"] == pytest.approx(reference["loss"], abs=2e-2), name
        assert result["weight"] == pytest.approx(reference["weight"], rel=1e-2), name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_then_one_then_four_processes_train_the_same_sequences(tmp_path: Path) -> None:
    strategies: dict[str, dict[str, Any]] = {"replicated": {}, "fsdp2": {"use_fsdp": True}}
    strategies["fsdp2 in 8 bits"] = {"use_fsdp": True, "optimizer_states": "8bit"}

    def parts(world: int, steps: int, **more: Any) -> list[dict[str, Any]]:
        # With a constant rate, the parts together equal one run of 9 steps.
        return [
            case(name, world=world, steps=steps, lr_scheduler="constant", **options)
            | {key: value.format(name) for key, value in more.items()}
            for name, options in strategies.items()
        ]

    straight = results(tmp_path, 1, parts(1, 9, output_dir="straight-{}"))
    found = results(tmp_path, 2, parts(2, 3))
    for processes, steps in ((1, 6), (4, 9)):
        found = results(tmp_path, processes, parts(processes, steps, resume_from_checkpoint="{}"))
    for name in strategies:
        assert found[name]["steps_trained"] == 3
        assert found[name]["loss"] == pytest.approx(straight[name]["loss"], abs=1e-5)
        assert found[name]["weight"] == pytest.approx(straight[name]["weight"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_job_of_two_processes_reports_the_first_failure(tmp_path: Path) -> None:
    good = make_run(tmp_path, 1, spec={"use_fsdp": True}, processes=2)
    assert start(good).wait(timeout=100) == 0, (good / "train.log").read_text()[-3000:]
    assert end_of(good).status == "succeeded"
    bad = make_run(
        tmp_path, 2, spec={"seq_len": 64, "dataset": {"path": "nothing.txt"}}, processes=2, data_root=str(tmp_path)
    )
    assert start(bad).wait(timeout=100) == 1
    end = end_of(bad)
    assert (end.status, end.reason) == ("failed", "invalid_data")
    assert end.error is not None
    assert "which matches no data file" in end.error.message


@pytest.mark.extended
@pytest.mark.timeout(120)
def test_a_killed_rank_is_named_and_not_the_ranks_that_failed_after_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, spec={"max_steps": 100_000, "checkpointing_steps": 100_000}, processes=2)
    process = start(run)
    wait_until(lambda: any(line.type == "progress" and line.step for line in journal(run)), 60, "the first step")
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if child.environ().get("RANK") == "1").kill()
    assert process.wait(timeout=60) == 1
    end = end_of(run)
    assert (end.status, end.reason) == ("failed", "process_killed")
    assert end.error is not None
    assert (end.error.evidence.rank, end.error.evidence.signal) == (1, "SIGKILL")
