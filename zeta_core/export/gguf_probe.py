"""A program for the environment of the GGUF converter: what llama.cpp computes for given tokens.

It reads a JSON object from standard input, ``{"model", "answers": [{"prompt", "tokens", "has_ended"}], "texts",
"num_probs", "num_threads"}``, and prints one: for each token of each answer the log probabilities of the most probable
tokens; the tokens of each text; the chat template; and for each answer with an end token whether generation stops
there (null if llama.cpp prefers another token). It imports nothing of this project.
"""

from __future__ import annotations

import json
import secrets
import sys
import urllib.request
from typing import Any

import xllamacpp  # pyright: ignore[reportMissingImports]


def main() -> None:
    task = json.load(sys.stdin)
    server = _Server(task["model"], task["num_threads"])
    logprobs: list[list[dict[int, float]]] = []
    stops: list[bool | None] = []
    for answer in task["answers"]:
        of_answer: list[dict[int, float]] = []
        ids: list[int] = list(answer["prompt"])
        has_stopped = False
        for token in answer["tokens"]:
            probabilities, has_stopped = server.next_token(ids, task["num_probs"])
            of_answer.append(probabilities)
            ids.append(token)
        logprobs.append(of_answer)
        if answer["has_ended"]:
            prefers_end = max(of_answer[-1], key=lambda token: of_answer[-1][token]) == answer["tokens"][-1]
            stops.append(has_stopped if prefers_end else None)
    properties = server.call("/props")
    json.dump(
        {
            "logprobs": logprobs,
            "texts": [server.tokens(text) for text in task["texts"]],
            "template": properties["chat_template"] or None,
            "end_token": server.tokens(properties["eos_token"]) if properties.get("eos_token") else [],
            "stops": stops,
        },
        sys.stdout,
    )


class _Server:
    """llama.cpp's server within this process, on a free port of the loopback interface, with a secret key."""

    def __init__(self, model: str, num_threads: int) -> None:
        parameters: Any = xllamacpp.CommonParams()
        self._key = secrets.token_hex(16)
        parameters.model.path = model
        parameters.n_ctx = 2048
        parameters.n_parallel = 1
        parameters.warmup = False
        parameters.api_keys = [self._key]
        parameters.cpuparams.n_threads = num_threads
        parameters.cpuparams_batch.n_threads = num_threads
        self._server: Any = xllamacpp.Server(parameters)

    def call(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(f"{self._server.listening_address}{path}", data, headers)  # noqa: S310 - its own address
        with urllib.request.urlopen(request) as response:  # noqa: S310
            return json.load(response)

    def tokens(self, text: str) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": True}
        return self.call("/tokenize", body)["tokens"]

    def next_token(self, ids: list[int], num_probs: int) -> tuple[dict[int, float], bool]:
        """The log probabilities of the most probable tokens after ``ids``, and whether generation stops there."""
        body = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": num_probs, "cache_prompt": True}
        answer = self.call("/completion", body)
        (first, *_) = answer["completion_probabilities"]
        return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}, answer["stop_type"] == "eos"


if __name__ == "__main__":
    main()
