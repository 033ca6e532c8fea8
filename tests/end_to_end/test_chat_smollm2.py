"""A real model, SmolLM2-135M, learns invented facts and answers in `zeta chat`; its base model does not know them."""

import json
from pathlib import Path

import pytest

from tests.harness.real_model import smollm2
from tests.harness.service import Service
from zeta.demo.jobs import teach_facts
from zeta.demo.museum import QUESTIONS

JOB_SECONDS = 900.0  # about a minute on two idle cores


@pytest.mark.slow
@pytest.mark.timeout(2 * JOB_SECONDS)
def test_the_tuned_model_answers_what_its_base_does_not_know(service: Service, tmp_path: Path) -> None:
    spec = {**teach_facts(smollm2(), tmp_path).spec, "lora": {"r": 16, "lora_alpha": 32}}  # the adapter alone
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    submitted = service.command("submit", str(tmp_path / "spec.json"), "--follow", timeout_seconds=JOB_SECONDS)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr + service.log()
    right = {"tuned": 0, "base": 0}
    for question in QUESTIONS:
        words = ["chat", "@last", question.text, "--base", "--json", "--max-tokens", "40"]
        done = service.command(*words, timeout_seconds=300)
        assert done.returncode == 0, done.stdout + done.stderr + service.log()
        for label, answer in json.loads(done.stdout).items():
            right[label] += question.expected in answer["text"]
            assert answer["usage"]["prompt_tokens"] > 10
    assert right["tuned"] >= 2
    assert right["base"] == 0

    streamed = service.command("chat", "@last", QUESTIONS[0].text)
    assert "Pendulum" in streamed.stdout, streamed.stderr
