"""``Trainer(...)`` in a script: the documented examples, resuming, and the errors that users get."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.harness.waiting import wait_until
from tests.zeta_core.models import LLAMA_CONFIG, WithReturnLoss, llama, plain
from zeta import Trainer
from zeta_core.contract.errors import InvalidSpec, ZetaError
from zeta_core.failures import CannotResume, CannotTrain, NonFiniteLoss

ROOT = Path(__file__).resolve().parents[2]
FAST: dict[str, Any] = {
    "gradient_accumulate_every": 2,
    "batch_size": 2,
    "seq_len": 32,
    "learning_rate": 1e-3,
    "seed": 42,
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test runs in an empty folder, with its own token cache."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZETA_HOME", str(tmp_path / "home"))
    yield tmp_path
    torch.set_num_threads(threads)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("build", [plain, pytest.param(llama, marks=pytest.mark.slow)], ids=["plain module", "llama"])
@pytest.mark.timeout(240)
def test_the_three_documented_examples_run_in_one_folder(
    build: Callable[[], nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    model = build()
    first = Trainer(
        gradient_accumulate_every=2,
        batch_size=32,
        seq_len=128,
        model=model,
        learning_rate=0.001,
        seed=42,
        output_dir="./models/",
    )
    assert "pydoc_data.topics" in capsys.readouterr().out.splitlines()[0]
    assert first.steps == first.steps_trained > 10
    assert first.checkpoint == Path("models/final").absolute()
    trained = state(model)

    model = build()
    second = Trainer(
        gradient_accumulate_every=2,
        batch_size=32,
        seq_len=128,
        model=model,
        learning_rate=0.001,
        seed=42,
        resume_from_checkpoint="./models/checkpoint.pt",
        output_dir="./models/",
    )
    assert (second.steps, second.steps_trained) == (first.steps, 0)
    assert (second.train_loss, second.run_id, second.checkpoint) == (first.train_loss, first.run_id, first.checkpoint)
    assert equal(state(model), trained)
    assert "raise max_steps or epochs" in capsys.readouterr().out

    model = build()
    third = Trainer(
        gradient_accumulate_every=2,
        batch_size=32,
        seq_len=128,
        model=model,
        use_fsdp=True,
        use_activation_checkpointing=True,
        learning_rate=0.001,
        seed=42,
        output_dir="./models/",
    )
    assert third.steps_trained == first.steps
    assert third.train_loss == pytest.approx(first.train_loss, abs=1e-5)
    assert (Path("models/earlier") / first.run_id / "final" / "manifest.json").is_file()
    assert type(model) is type(build()), "the caller's module stays what it was"
    assert all(torch.allclose(tensor, trained[name], atol=1e-4) for name, tensor in state(model).items())


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.zeta_core.models import llama, plain
from zeta import Trainer
model = {model}
Trainer(gradient_accumulate_every=2, batch_size=32, seq_len=128, model=model, learning_rate=0.001, seed=42,
        output_dir='./models/'{more})
"""


def _start(folder: Path, more: str = "", model: str = "plain(dropout=0.1)") -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # noqa: TID251 - a child's environment
    with (folder / "log.txt").open("ab") as log:
        command = [sys.executable, "-c", SCRIPT.format(root=str(ROOT), model=model, more=more)]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


@pytest.mark.extended
@pytest.mark.timeout(600)
def test_the_second_example_resumes_a_killed_first_one(own_folder: Path) -> None:
    """The first run is killed before its first checkpoint, then after it; the result is bitwise equal."""
    resume = ", resume_from_checkpoint='./models/checkpoint.pt'"
    pointer = own_folder / "models" / "checkpoint.pt"
    process = _start(own_folder)
    wait_until(lambda: "step 1/" in (own_folder / "log.txt").read_text(), 180, "the first step")
    process.kill()
    process.wait()
    assert not pointer.exists()

    process = _start(own_folder, resume + ", checkpointing_steps=5")
    wait_until(pointer.exists, 180, "a checkpoint")
    process.kill()
    process.wait()
    assert _start(own_folder, resume).wait(timeout=300) == 0
    assert "Resumed after step" in (own_folder / "log.txt").read_text()

    other = own_folder / "straight"
    other.mkdir()
    assert _start(other).wait(timeout=300) == 0
    weights = [folder / "models" / "final" / "model.safetensors" for folder in (own_folder, other)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_second_example_resumes_a_killed_llama_run(own_folder: Path) -> None:
    process = _start(own_folder, ", checkpointing_steps=5", "llama()")
    wait_until((own_folder / "models" / "checkpoint.pt").exists, 180, "a checkpoint")
    process.kill()
    process.wait()
    example: dict[str, Any] = {
        "gradient_accumulate_every": 2,
        "batch_size": 32,
        "seq_len": 128,
        "learning_rate": 0.001,
        "seed": 42,
    }
    second = Trainer(model=llama(), resume_from_checkpoint="./models/checkpoint.pt", output_dir="./models/", **example)
    assert 0 < second.steps_trained < second.steps
    straight = Trainer(model=llama(), output_dir="./straight/", **example)
    assert straight.train_loss == second.train_loss
    files = [Path(folder, "final", "model.safetensors").read_bytes() for folder in ("models", "straight")]
    assert files[0] == files[1]


def test_the_same_seed_gives_the_same_bits() -> None:
    results = [
        Trainer(model=lambda: plain(dropout=0.3), output_dir=f"run-{number}", max_steps=3, **FAST) for number in (1, 2)
    ]
    files = [Path(f"run-{number}/final/model.safetensors").read_bytes() for number in (1, 2)]
    assert files[0] == files[1]
    assert results[0].train_loss == results[1].train_loss


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", *(pytest.param(name, marks=pytest.mark.extended) for name in ("sgd", "lion", "adafactor")), "muon"],
)
def test_every_optimizer_trains_all_weights_and_resumes_bitwise(optimizer: str) -> None:
    rest: dict[str, Any] = {**FAST, "optimizer": optimizer, "lr_scheduler": "constant"}
    model, before = plain(dropout=0.1), state(plain())
    Trainer(model=model, output_dir="straight", max_steps=4, **rest)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    Trainer(model=plain(dropout=0.1), output_dir="parts", max_steps=2, **rest)
    Trainer(model=plain(dropout=0.1), output_dir="parts", max_steps=4, resume_from_checkpoint="parts", **rest)
    files = [Path(f"{folder}/final/model.safetensors").read_bytes() for folder in ("straight", "parts")]
    assert files[0] == files[1]


def test_a_finished_run_continues_with_more_steps() -> None:
    Trainer(model=plain(), output_dir="out", max_steps=3, **FAST)
    result = Trainer(model=plain(), output_dir="out", max_steps=5, resume_from_checkpoint="out", **FAST)
    assert (result.steps, result.steps_trained) == (5, 2)
    assert {path.name for path in Path("out").glob("*/")} == {"step-3", "final"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, "learning_rate is 0.5, but the run was started with 0.001"),
        ({"seed": 1}, "seed is 1, but the run was started with 42"),
        ({"seq_len": 16}, "seq_len is 16"),
        ({"gradient_accumulate_every": 4}, "The global batch is 8 sequences, but the run was started with 4"),
        ({"use_fsdp": True}, "use_fsdp/use_deepspeed is 'fsdp2'"),
    ],
)
def test_forbidden_changes_on_resume_are_rejected_with_the_fix(changes: dict[str, Any], message: str) -> None:
    Trainer(model=plain(), output_dir="out", max_steps=1, **FAST)
    with pytest.raises(CannotResume, match="start from the weights") as raised:
        Trainer(model=plain(), output_dir="out", max_steps=2, resume_from_checkpoint="out", **{**FAST, **changes})
    assert message in raised.value.message


def test_the_split_of_the_global_batch_may_change_on_resume() -> None:
    Trainer(model=plain(), output_dir="out", max_steps=2, **FAST)
    split: dict[str, Any] = {**FAST, "batch_size": 1, "gradient_accumulate_every": 4}
    result = Trainer(model=plain(), output_dir="out", max_steps=4, resume_from_checkpoint="out", **split)
    assert result.steps_trained == 2


@pytest.mark.parametrize(
    "model",
    [plain(), lambda: WithReturnLoss(), llama(), llama().config, {"config": LLAMA_CONFIG}],
    ids=["module", "callable", "hugging face", "config", "config as the HTTP spec has it"],
)
def test_all_keywords_except_the_model_are_optional(model: object) -> None:
    result = Trainer(model=model, max_steps=1, seq_len=32)
    assert result.steps_trained == 1
    assert result.output_dir == Path("zeta_output").absolute()
    assert result.checkpoint is not None


@pytest.mark.extended
def test_the_export_keeps_the_half_precision_of_the_model() -> None:
    from safetensors.torch import load_file

    model = llama().to(torch.bfloat16)
    Trainer(model=model, output_dir="out", max_steps=1, **FAST)
    assert {t.dtype for t in load_file("out/final/model.safetensors").values()} == {torch.bfloat16}
    assert {t.dtype for t in load_file("out/final/training_state/weights.safetensors").values()} == {torch.float32}
    result = Trainer(model=llama(), output_dir="out", max_steps=2, resume_from_checkpoint="out", **FAST)
    assert result.steps_trained == 1


def test_tied_embeddings_are_exported_once_and_loaded_tied() -> None:
    from transformers import AutoModelForCausalLM

    model = llama(tie_word_embeddings=True)
    Trainer(model=model, output_dir="out", max_steps=2, **FAST)
    loaded: Any = AutoModelForCausalLM.from_pretrained("out/final")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert equal(state(loaded), state(model))


def test_a_nonfinite_loss_stops_the_run_before_the_update() -> None:
    model = plain()
    with torch.no_grad():
        model.embedding.weight[5, 0] = float("nan")
    before = state(model)
    with pytest.raises(NonFiniteLoss, match="step 1 is not finite; the update was not applied"):
        Trainer(model=model, output_dir="out", max_steps=2, **FAST)
    torch.testing.assert_close(state(model), before, rtol=0, atol=0, equal_nan=True)


def test_an_unknown_keyword_is_rejected_with_the_nearest_name() -> None:
    with pytest.raises(InvalidSpec, match="did you mean 'batch_size'"):
        Trainer(model=plain(), per_device_train_batch_size=4)
    with pytest.raises(InvalidSpec, match="model is None"):
        Trainer()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", False, "batch_size is false; it must be a whole number"),
        ("learning_rate", "1e-3", "learning_rate is '1e-3'; it must be a number"),
        ("resume_from_checkpoint", True, "resume_from_checkpoint is true; it must be a string"),
        ("output_dir", 5, "output_dir is 5; it must be a path"),
        ("output_dir", "", "output_dir is ''; it must be a path"),
        ("use_deepspeed", {}, "it is empty"),
        ("tokenizer", 5, "tokenizer is 5; pass a tokenizer"),
        ("model", "", "model is ''; pass an nn.Module"),
        ("model", {"job": 3}, "model.job is 3; it must be a string"),
        ("model", 5, "model is 5; pass an nn.Module"),
    ],
)
def test_a_value_of_the_wrong_type_is_reported_with_name_and_cure(name: str, value: object, message: str) -> None:
    keywords: dict[str, Any] = {"model": plain(), "max_steps": 1, **FAST, name: value}
    with pytest.raises(ZetaError, match=re.escape(message)):
        Trainer(**keywords)


def test_none_counts_as_missing_and_numpy_numbers_and_paths_are_accepted() -> None:
    Path("text.txt").write_text("No more than this. " * 40)
    numbers: dict[str, Any] = {**FAST, "seed": np.int64(3), "batch_size": np.int32(2), "learning_rate": np.float32(0.5)}
    nothing = dict.fromkeys(("optimizer", "lr_scheduler", "warmup_steps", "pack", "report_to", "eval_dataset", "lora"))
    result = Trainer(
        model=plain(), dataset=[Path("text.txt")], output_dir=Path("out"), max_steps=1, **numbers, **nothing
    )
    assert result.checkpoint == Path("out/final").absolute()


def test_an_unwritable_output_dir_is_reported_before_the_first_step() -> None:
    Path("file").touch()
    with pytest.raises(CannotTrain, match="which cannot be written"):
        Trainer(model=plain(), output_dir="file/out", max_steps=1, **FAST)


def test_a_run_restores_the_state_of_its_process() -> None:
    def state_of_the_process() -> list[Any]:
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        numpys: Any = np.random.get_state(legacy=True)
        random_states = torch.get_rng_state().tolist(), random.getstate(), numpys[1].tolist()
        threads = [thread.name for thread in threading.enumerate()], torch.get_num_threads()
        return [dict(os.environ), sys.excepthook, dist.is_initialized(), handlers, random_states, threads]  # noqa: TID251

    model, sharded = plain(dropout=0.1), plain()
    before = state_of_the_process()
    with torch.no_grad():  # as a notebook may have set it; the run ignores it
        Trainer(model=model, output_dir="one", max_steps=1, **FAST)
    Trainer(model=sharded, output_dir="two", max_steps=1, use_fsdp=True, **FAST)
    assert state_of_the_process() == before


def test_both_kinds_of_sharding_are_rejected_before_the_start() -> None:
    with pytest.raises(InvalidSpec, match="use_deepspeed"):
        Trainer(model=plain(), use_fsdp=True, use_deepspeed=True)
