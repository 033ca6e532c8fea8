"""Served models on a worker: one process per model, which ends when a job needs its slot or nobody asks any more."""

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pydantic import BaseModel

from tests.harness.waiting import wait_until
from tests.zeta_core.data.chat_templates import CHATML, byte_tokenizer
from tests.zeta_core.models import llama
from worker.machine.devices import Slot
from worker.serving.served_models import ServedModels
from worker.settings import WorkerSettings
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.wire.answers import (
    AnswerControl,
    AnswerOptions,
    AnswerPart,
    AnswerRequest,
    Prompt,
    ServedWeights,
)
from zeta_core.contract.wire.run_directory import checkpoint_key
from zeta_core.system.artifact_store.folder import FolderStore

COMMAND = (sys.executable, "-P", "-m", "zeta_core")
SLOT = Slot(0, "cpu", "1 core", 2**30)
LOAD_SECONDS = 60.0


@dataclass
class Worker:
    """The served models of a worker, and the parts that it has sent, all of which are acknowledged at once."""

    home: Path
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    parts: list[AnswerPart] = field(default_factory=list[AnswerPart])

    def __post_init__(self) -> None:
        settings = WorkerSettings(home=self.home, worker_name="w", worker_secret="secret", **self.settings)
        self.root, self.artifacts = settings.root, settings.artifacts
        self.models = ServedModels(settings, COMMAND, [SLOT], 1, self._post, FolderStore(settings.artifacts))

    def _post(self, key: tuple[object, ...], message: BaseModel, stream: str) -> None:
        assert isinstance(message, AnswerPart)
        self.parts.append(message)

    def checkpoint(self) -> ServedWeights:
        """A small stored checkpoint."""
        job = new_id("job")
        folder = self.artifacts / checkpoint_key(job, "final")
        model: Any = llama()
        model.generation_config.eos_token_id = 383  # which this model never writes
        model.save_pretrained(folder)
        byte_tokenizer(CHATML).save_pretrained(folder)
        source: Any = {"job": job, "checkpoint": "final"}
        return ServedWeights(name=f"{job}/final", project="default", model=source, fingerprint="f" * 64)

    def adapters(self, number: int) -> list[ServedWeights]:
        """Stored adapters of one base."""
        from peft import LoraConfig, PeftModel, get_peft_model

        base = self.checkpoint()
        found: list[ServedWeights] = []
        for seed in range(number):
            job = new_id("job")
            folder = self.artifacts / checkpoint_key(job, "final")
            model: Any = llama()
            model.generation_config.eos_token_id = 383
            torch.manual_seed(seed)
            config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            adapted = get_peft_model(model, config)
            assert isinstance(adapted, PeftModel)
            adapted.peft_config["default"].base_model_name_or_path = base.name
            adapted.save_pretrained(str(folder))
            model.generation_config.save_pretrained(folder)
            byte_tokenizer(CHATML).save_pretrained(folder)
            source: Any = {"job": job, "checkpoint": "final"}
            update = {
                "name": f"{job}/final",
                "model": source,
                "fingerprint": str(seed) * 64,
                "base": "the same",
                "bases": [base.name],
            }
            found.append(base.model_copy(update=update))
        return found

    def ask(self, weights: ServedWeights, *, used: frozenset[int] = frozenset(), max_tokens: int = 5) -> str:
        request_id = new_id("run")
        options = AnswerOptions(max_tokens=max_tokens, temperature=0.0)
        prompt = Prompt(text="Hi")
        self.models.take(
            AnswerRequest(request_id=request_id, server="s", weights=weights, prompt=prompt, options=options), used
        )
        return request_id

    def last(self, request_id: str) -> AnswerPart | None:
        """The last part of an answer, once it has arrived."""
        self.models.step()
        numbers = [part.number for part in self.parts if part.request_id == request_id]
        received = max(numbers, default=0)
        self.models.control(AnswerControl(request_id=request_id, received=received, consumed=received))
        found = [part for part in self.parts if part.request_id == request_id and part.is_last]
        return found[0] if found else None

    def text(self, request_id: str) -> str:
        parts = {part.number: part for part in self.parts if part.request_id == request_id and part.number}
        return "".join(piece.text for _, part in sorted(parts.items()) for piece in part.pieces)

    def answer(self, request_id: str) -> AnswerPart:
        found = wait_until(lambda: self.last(request_id), LOAD_SECONDS, "the answer")
        assert found is not None
        return found

    def processes(self) -> list[Path]:
        return sorted(self.root.glob("serving/*"))


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    running = Worker(tmp_path)
    yield running
    running.models.stop()
    wait_until(lambda: running.models.step() or not running.processes(), 20, "the processes to end")


@pytest.mark.slow
def test_a_model_is_loaded_once_and_ended_for_a_job(worker: Worker) -> None:
    weights = worker.checkpoint()
    first = worker.answer(worker.ask(weights))
    assert first.failure is None
    assert first.pieces[-1].num_tokens == 5
    assert worker.answer(worker.ask(weights)).failure is None
    assert len(worker.processes()) == 1
    [report] = worker.models.reports(0)
    assert (report.model, report.project, report.ready, report.requests) == (weights.name, "default", True, 0)

    running = worker.ask(weights, max_tokens=200)
    wait_until(lambda: worker.models.evict({0}), 20, "the model to leave its slot")
    assert worker.processes() == []
    failure = worker.answer(running).failure
    assert failure is not None
    assert failure.code == "evicted"
    assert worker.models.reports(0) == []
    failure = worker.answer(worker.ask(weights, used=frozenset({0}))).failure
    assert failure is not None
    assert failure.code == "no_capacity"


@pytest.mark.slow
def test_adapters_of_one_base_share_a_process(worker: Worker, tmp_path: Path) -> None:
    first, second, unfit = worker.adapters(3)
    folder = worker.artifacts / checkpoint_key(unfit.name.partition("/")[0], "final")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 8', '"r": 4'))
    texts = {}
    for weights in (first, second, first):
        answer = worker.answer(worker.ask(weights, max_tokens=20))
        assert answer.failure is None
        texts.setdefault(weights.name, set()).add(worker.text(answer.request_id))
    assert all(len(found) == 1 for found in texts.values())
    assert texts[first.name] != texts[second.name]
    assert len(worker.processes()) == 1
    reports = worker.models.reports(0)
    assert [(report.model, report.base) for report in reports] == [(first.name, "the same"), (second.name, "the same")]

    failure = worker.answer(worker.ask(unfit)).failure
    assert failure is not None
    assert failure.message == f"{unfit.name} needs a process of its own; send the request again."
    assert worker.answer(worker.ask(second)).failure is None
    failure = worker.answer(worker.ask(unfit)).failure  # a process of its own reports that the files are damaged
    assert failure is not None
    assert failure.code == "model_failed"
    assert "cannot be added to" in failure.message
    assert worker.answer(worker.ask(first)).failure is None

    other_project = second.model_copy(update={"project": "other"})
    assert not other_project.shares_base(first)


@pytest.mark.slow
def test_an_idle_model_is_unloaded_and_makes_way_for_another(tmp_path: Path) -> None:
    worker = Worker(tmp_path, {"serve_idle_seconds": 3600, "serve_models": 1})
    first, second = worker.checkpoint(), worker.checkpoint()
    assert worker.answer(worker.ask(first)).failure is None
    assert worker.answer(worker.ask(second)).failure is None
    wait_until(lambda: worker.models.step() or len(worker.processes()) == 1, 20, "the first model to end")
    assert [report.model for report in worker.models.reports(0)] == [second.name]
    worker.models.stop()

    impatient = Worker(tmp_path / "other", {"serve_idle_seconds": 0.5})
    assert impatient.answer(impatient.ask(impatient.checkpoint())).failure is None
    wait_until(lambda: impatient.models.step() or not impatient.processes(), 20, "the idle model to end")
    wait_until(lambda: worker.models.step() or not worker.processes(), 20, "the other processes to end")


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_a_failure_with_the_reason(worker: Worker) -> None:
    weights = worker.checkpoint()
    replaced = weights.model_copy(update={"has_manifest": True})
    folder = worker.artifacts / checkpoint_key(weights.name.partition("/")[0], "final")
    (folder / "manifest.json").write_text(json.dumps({"another": "checkpoint"}))
    failure = worker.answer(worker.ask(replaced)).failure
    assert failure is not None
    assert failure.code == "process_ended"  # the client may send it again
    assert failure.message == f"{weights.name} was replaced by a newer one; send the request again."


@pytest.mark.slow
def test_processes_of_an_earlier_worker_are_killed(worker: Worker) -> None:
    worker.answer(worker.ask(worker.checkpoint()))
    [directory] = worker.processes()
    pid = json.loads((directory / "process.json").read_text())["pid"]
    process = psutil.Process(pid)
    process.send_signal(signal.SIGSTOP)  # it would notice by itself that its worker is gone
    Worker(worker.home).models.end_earlier()
    assert process.wait(20) is not None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
def test_a_model_that_exceeds_its_memory_limit_does_not_fit(tmp_path: Path) -> None:
    limited = Worker(tmp_path, {"serve_memory_bytes": 256 * 2**20})  # less than the libraries need
    weights = limited.checkpoint()
    failure = limited.answer(limited.ask(weights)).failure
    assert failure is not None
    assert failure.code == "model_failed"
    assert failure.message.startswith(f"The process that served {weights.name} used 0.")
    assert failure.message.endswith(
        "more than its limit of 0.25 GiB (ZETA_SERVE_MEMORY_BYTES), and was ended. The model does not fit into the "
        "memory."
    )
    wait_until(lambda: limited.models.step() or not limited.processes(), 20, "the process to end")
