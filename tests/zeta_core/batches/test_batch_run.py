"""A batch answers each request of its file once, also across attempts."""

import io
import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.zeta_core.models import llama
from tests.zeta_core.serve.test_generation import generated_text, loaded_model
from zeta_core.batches.run import BatchRun
from zeta_core.checkpoint.checkpoint_files import find_damage, list_checkpoints
from zeta_core.contract.job.events import CheckpointLine, ProgressLine
from zeta_core.contract.job.status import StopAction
from zeta_core.contract.openai.batch_files import read_input
from zeta_core.contract.spec.batch_spec import BatchSpec
from zeta_core.report.reporter import Reporter
from zeta_core.serve.loading import LoadedModel

PROMPTS = [f"Number {number}" for number in range(9)]
JOB = "job_00000000000000000001"


def request(number: int, **body: Any) -> bytes:
    line = {
        "custom_id": f"request-{number}",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "small", "prompt": PROMPTS[number], "temperature": 0, "max_tokens": 8, **body},
    }
    return json.dumps(line).encode() + b"\n"


class Lines:
    def __init__(self) -> None:
        self.written: list[Any] = []

    def write(self, line: Any) -> None:
        self.written.append(line)

    def close(self) -> None: ...


class Batch:
    """A batch of `PROMPTS` in a folder, whose attempts have a model of their own."""

    def __init__(self, folder: Path, loaded: LoadedModel, input_lines: list[bytes]) -> None:
        self.folder, self.loaded, self.input_lines = folder, loaded, input_lines
        self.output = folder / "output"
        self.lines = Lines()
        self._attempts = count(1)

    def attempt(self, stop: Callable[[], StopAction | None] = lambda: None) -> tuple[BatchRun, StopAction | None]:
        """Run an attempt from the newest checkpoint."""
        run_dir = self.folder / f"attempt-{next(self._attempts)}"
        run_dir.mkdir()
        spec: Any = {
            "model": "small",
            "model_name": "small",
            "fingerprint": "f" * 64,
            "has_manifest": False,
            "endpoint": "/v1/completions",
            "input": {"file": "file_1"},
            "num_requests": len(self.input_lines),
        }
        read = read_input(io.BytesIO(b"".join(self.input_lines)), "/v1/completions")
        assert read.faults == []
        run = BatchRun(
            BatchSpec.model_validate(spec),
            read.requests,
            self.loaded,
            Reporter(self.lines),
            job_id=JOB,
            run_dir=run_dir,
            output_dir=self.output,
        )
        stored = list_checkpoints(self.output)
        return run, run.answer(stored[0].directory if stored else None, stop)

    def results(self, name: str, checkpoint: str = "final") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / checkpoint / name).read_text().splitlines()]


@pytest.fixture
def loaded() -> LoadedModel:
    return loaded_model(llama())


def test_every_request_is_answered_in_the_order_of_the_file(tmp_path: Path, loaded: LoadedModel) -> None:
    batch = Batch(tmp_path, loaded, [request(number) for number in range(9)])
    run, action = batch.attempt()
    assert action is None
    lines = batch.results("output.jsonl")
    assert [line["custom_id"] for line in lines] == [f"request-{number}" for number in range(9)]
    for line, prompt in zip(lines, PROMPTS, strict=True):
        body = line["response"]["body"]
        assert (line["error"], line["response"]["status_code"], body["model"]) == (None, 200, "small")
        assert body["choices"][0]["text"] == generated_text(loaded, prompt, 8)
        assert body["usage"]["completion_tokens"] == 8
    assert batch.results("errors.jsonl") == []
    assert (run.result.num_answered, run.result.num_failed, run.result.completion_tokens) == (9, 0, 72)
    [final] = list_checkpoints(batch.output)
    assert find_damage(final) is None
    assert {file.role for file in final.manifest.files} == {"results"}
    progress = [line for line in batch.lines.written if isinstance(line, ProgressLine)]
    assert (progress[-1].step, progress[-1].total_steps, progress[-1].num_failed) == (9, 9, 0)


def test_a_request_that_does_not_fit_is_an_error_of_its_own(tmp_path: Path, loaded: LoadedModel) -> None:
    batch = Batch(tmp_path, loaded, [request(0), request(1, max_tokens=5000), request(2)])
    run, _ = batch.attempt()
    assert [line["custom_id"] for line in batch.results("output.jsonl")] == ["request-0", "request-2"]
    [failed] = batch.results("errors.jsonl")
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("request-1", 400)
    assert "context is 256 tokens" in failed["response"]["body"]["error"]["message"]
    assert (run.result.num_answered, run.result.num_failed) == (2, 1)


@pytest.mark.parametrize("num_steps", [1, 9, 20, 50])
def test_an_attempt_continues_after_the_requests_of_the_earlier_one(
    tmp_path: Path, loaded: LoadedModel, num_steps: int
) -> None:
    lines = [request(number, max_tokens=2 + 5 * number) for number in range(9)]
    batch = Batch(tmp_path, loaded, lines)
    steps = count()
    _, action = batch.attempt(lambda: "pause" if next(steps) >= num_steps else None)
    first = list_checkpoints(batch.output)
    if action is not None:
        done = first[0].manifest.step if first else 0
        assert done < 9
        batch.lines.written.clear()
        _, action = batch.attempt()
        assert action is None
        saved = [line.name for line in batch.lines.written if isinstance(line, CheckpointLine)]
        assert saved == ["final"]
    interrupted = batch.results("output.jsonl")
    whole = Batch(tmp_path / "whole", loaded, lines) if (tmp_path / "whole").mkdir() is None else batch
    whole.attempt()
    uninterrupted = whole.results("output.jsonl")
    assert [line["id"] for line in interrupted] == [line["id"] for line in uninterrupted]
    texts = [[line["response"]["body"]["choices"] for line in part] for part in (interrupted, uninterrupted)]
    assert texts[0] == texts[1]


def test_a_cancelled_batch_keeps_its_results(tmp_path: Path, loaded: LoadedModel) -> None:
    lines = [request(0, max_tokens=5000), *(request(number, max_tokens=2 + 5 * number) for number in range(1, 9))]
    batch = Batch(tmp_path, loaded, lines)
    steps = count()
    run, action = batch.attempt(lambda: "cancel" if next(steps) >= 25 else None)
    assert action == "cancel"
    [checkpoint] = list_checkpoints(batch.output)
    answered, failed = (batch.results(name, checkpoint.manifest.name) for name in ("output.jsonl", "errors.jsonl"))
    assert [line["custom_id"] for line in failed] == ["request-0"]
    assert [line["custom_id"] for line in answered] == [f"request-{number + 1}" for number in range(len(answered))]
    assert 0 < len(answered) < 8
    assert len(answered) == run.result.num_answered == checkpoint.manifest.metrics["num_answered"]
