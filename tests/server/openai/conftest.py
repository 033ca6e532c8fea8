"""Fixtures: a server with one named base model, and the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.harness.openai_client import openai_client
from tests.harness.valkey import ValkeyServer
from tests.server.server_process import API_KEY, SPEC, ServerProcess, running_server

BASE_MODEL = "gpt-4o-mini-2024-07-18"


@pytest.fixture(scope="module")
def server(shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = json.dumps({BASE_MODEL: SPEC["model"], "org/small": SPEC["model"]})
    home = tmp_path_factory.mktemp("server")
    with running_server(home, shared_valkey.second_url, ZETA_OPENAI_MODELS=models) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with openai_client(server.url, API_KEY) as client:
        yield client
