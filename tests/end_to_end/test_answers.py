"""Checkpoints answer the official client: the same text as transformers, and clear errors when something ends it."""

import hashlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import redis
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.end_to_end.chat_jobs import CONTEXT, QUESTION, chat_job, run
from tests.end_to_end.specs import TINY_LLAMA, tiny_job
from tests.harness.openai_client import openai_client, strictly
from tests.harness.service import Service, running_service
from tests.harness.waiting import wait_until

LOAD_SECONDS = 120.0
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("answers")) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with openai_client(service.url, service.api_key, timeout=LOAD_SECONDS) as client:
        yield client


@pytest.fixture(scope="module")
def job(service: Service) -> str:
    return chat_job(service)


@pytest.fixture(scope="module")
def text_job(service: Service) -> str:
    """A succeeded job with a slow model, whose greedy continuations do not end because it has learned nothing."""
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "max_position_embeddings": CONTEXT}
    spec = tiny_job(model={"config": {**TINY_LLAMA, **shape}}, max_steps=1, learning_rate=1e-9)
    return run(service, spec)


@pytest.fixture(scope="module")
def checkpoint(service: Service, job: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("final")
    done = service.command("download", job, "-o", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def generated_ids(checkpoint: Path, inputs: Any, num_tokens: int) -> list[int]:
    """The token ids that transformers generates, greedily."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        ids = model.eval().generate(**inputs, do_sample=False, max_new_tokens=num_tokens)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_chat_gives_the_text_of_transformers(client: OpenAI, job: str, checkpoint: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = tokenizer.decode(generated_ids(checkpoint, inputs, 100), skip_special_tokens=True)

    answer = strictly(
        client.chat.completions.create(model=job, messages=QUESTION, temperature=0, max_completion_tokens=100)
    )
    assert answer.choices[0].message.content == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert answer.usage.completion_tokens <= 100
    manifest = (checkpoint / "manifest.json").read_bytes()
    assert answer.system_fingerprint == hashlib.sha256(manifest).hexdigest()

    chunks = [
        strictly(chunk)
        for chunk in client.chat.completions.create(
            model=f"{job}/final",
            messages=QUESTION,
            temperature=0,
            max_completion_tokens=100,
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == expected
    assert len(chunks) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason
    assert chunks[-1].usage == answer.usage


def test_a_text_is_continued_as_transformers_does(client: OpenAI, job: str, checkpoint: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer("The sea", add_special_tokens=False, return_tensors="pt")
    answer = strictly(client.completions.create(model=job, prompt="The sea", temperature=0, max_tokens=50, logprobs=2))
    expected = [number for number in generated_ids(checkpoint, inputs, 50) if number not in tokenizer.all_special_ids]
    assert answer.choices[0].text == tokenizer.decode(expected)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.tokens == [tokenizer.decode([number]) for number in expected]
    assert len(logprobs.token_logprobs) == len(logprobs.tokens)
    stream = client.completions.create(model=job, prompt="The sea", temperature=0, max_tokens=50, stream=True)
    chunks = list(stream)
    strictly(chunks[-1])  # the type lacks the finish_reason null of the others, which OpenAI sends
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_concurrent_chats_get_the_answers_that_each_gets_alone(client: OpenAI, job: str) -> None:
    def ask(number: int) -> str | None:
        messages: list[Any] = [{"role": "user", "content": f"Number {number}" * number}]
        answer = client.chat.completions.create(model=job, messages=messages, seed=number, max_tokens=60)
        return answer.choices[0].message.content

    alone = [ask(number) for number in range(4)]
    with ThreadPoolExecutor(4) as executor:
        together = list(executor.map(ask, range(4)))
    assert together == alone


def test_parameters_that_have_no_effect_are_refused_by_name(client: OpenAI, job: str) -> None:
    with pytest.raises(openai.BadRequestError, match="reasoning_effort") as caught:
        client.chat.completions.create(model=job, messages=QUESTION, reasoning_effort="low")
    assert caught.value.param == "reasoning_effort"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=job, messages=QUESTION, temperature=3)
    with pytest.raises(openai.BadRequestError, match=f"context is {CONTEXT} tokens"):
        client.chat.completions.create(model=job, messages=QUESTION, max_tokens=CONTEXT)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=f"{job}/step-999", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="trained from scratch"):
        client.chat.completions.create(model=f"{job}/base", messages=QUESTION)


def test_a_killed_process_ends_the_stream_with_an_error_and_the_next_request_works(
    service: Service, client: OpenAI, text_job: str
) -> None:
    stream = client.completions.create(model=text_job, prompt="a", max_tokens=4000, temperature=0, stream=True)
    next(stream)
    for process in serving_processes(service):
        process.send_signal(signal.SIGKILL)
    with pytest.raises(openai.APIError, match="has ended; send the request again"):
        for _ in stream:
            pass
    answer = client.completions.create(model=text_job, prompt="a", max_tokens=5)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


@pytest.mark.extended
def test_nothing_of_an_answer_is_lost_when_redis_loses_everything(
    service: Service, client: OpenAI, text_job: str
) -> None:
    def ask() -> Iterator[str]:
        stream = client.completions.create(model=text_job, prompt="a", max_tokens=600, temperature=0, stream=True)
        return (chunk.choices[0].text for chunk in stream)

    expected = "".join(ask())
    pieces: list[str] = []
    with redis.Redis.from_url((service.home / "redis.url").read_text().strip()) as client_of_redis:
        for number, piece in enumerate(ask()):
            pieces.append(piece)
            if number in (3, 40, 41):
                client_of_redis.unlink(*client_of_redis.scan_iter(), "")  # it may not run FLUSHALL
    assert "".join(pieces) == expected


def test_a_client_that_disconnects_ends_its_request_within_a_second(
    service: Service, http: httpx.Client, client: OpenAI, text_job: str
) -> None:
    client.completions.create(model=text_job, prompt="a", max_tokens=1)
    stream = client.completions.create(model=text_job, prompt="a", max_tokens=4000, temperature=0, stream=True)
    next(stream)
    wait_until(lambda: [model["requests"] for model in served_models(http)] == [1], 10, "the request to be shown")
    stream.close()
    wait_until(lambda: [model["requests"] for model in served_models(http)] == [0], 1, "the request to end")


def test_a_job_takes_the_device_of_a_served_model(
    service: Service, http: httpx.Client, client: OpenAI, text_job: str
) -> None:
    stream = client.completions.create(model=text_job, prompt="a", max_tokens=4000, temperature=0, stream=True)
    next(stream)
    [served] = served_models(http)
    assert (served["model"], served["ready"]) == (f"{text_job}/final", True)
    submitted = http.post("/v1/jobs", json=tiny_job(max_steps=1_000_000)).raise_for_status().json()["id"]
    with pytest.raises(openai.APIError, match="because a job needs its device"):
        for _ in stream:
            pass
    wait_until(lambda: http.get(f"/v1/jobs/{submitted}").json()["status"] == "running", 60, "the job to run")
    with pytest.raises(openai.InternalServerError, match="are in use by jobs") as caught:
        client.completions.create(model=text_job, prompt="a")
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) <= 120

    # The newest checkpoint of a paused job answers.
    wait_until(lambda: checkpoints(http, submitted), 60, "a checkpoint")
    http.post(f"/v1/jobs/{submitted}/pause").raise_for_status()
    wait_until(lambda: http.get(f"/v1/jobs/{submitted}").json()["status"] == "paused", 60, "the job to be paused")
    step = checkpoints(http, submitted)[0]
    answer = client.completions.create(model=submitted, prompt="a", max_tokens=5)
    assert answer.usage is not None
    assert f"{submitted}/{step}" in [model["model"] for model in served_models(http)]
    http.post(f"/v1/jobs/{submitted}/cancel").raise_for_status()


@pytest.mark.slow
def test_adapters_and_their_base_are_served_by_one_process(
    service: Service, http: httpx.Client, client: OpenAI, job: str
) -> None:
    adapters = [chat_job(service, model={"job": job}, lora={"r": 4}, seed=seed, learning_rate=0.05) for seed in (1, 2)]

    def ask(adapter: str) -> str:
        answer = client.completions.create(model=adapter, prompt="a", max_tokens=40, temperature=0)
        return answer.choices[0].text

    def served() -> list[dict[str, Any]]:
        return [model for model in served_models(http) if model["model"].partition("/")[0] in adapters]

    base = ask(job)  # from a process of its own, because it is requested as another job's model
    alone = [ask(adapter) for adapter in adapters]
    names = [*adapters, f"{adapters[0]}/base"]
    assert ask(names[2]) == base not in alone
    wait_until(lambda: len(served()) == 3, 10, "both adapters and their base to be shown")
    assert len({model["base"] for model in served()}) == 1
    assert served()[0]["base"] is not None
    assert len(serving_processes(service)) == len(served_models(http)) - 2
    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(ask, [*names, *adapters])) == [*alone, base, *alone]


def checkpoints(http: httpx.Client, job_id: str) -> list[str]:
    """The names, newest first."""
    return [
        checkpoint["name"]
        for checkpoint in http.get(f"/v1/jobs/{job_id}/checkpoints").raise_for_status().json()["data"]
    ]


def served_models(http: httpx.Client) -> list[dict[str, Any]]:
    workers = http.get("/v1/workers").raise_for_status().json()["data"]
    return [served for worker in workers for slot in worker["slots"] for served in slot["served"]]


def serving_processes(service: Service) -> list[psutil.Process]:
    marked: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "serve" in words and str(service.home) in words[-1] and process.pid != os.getpid():
            marked.append(process)
    assert marked, "no serving process is running"
    return marked
