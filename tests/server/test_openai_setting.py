"""``ZETA_OPENAI_MODELS`` is validated when the server starts."""

import pytest

from server.settings import ServerSettings
from zeta_core.contract.errors import InvalidSettings


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gpt-4o=org/name", "is not valid JSON"),
        ('["org/name"]', "it must be a JSON object"),
        ('{"a": "org/name", "b": 3}', "the source of 'b' is not a model"),
        ('{"a": {"path": "/etc"}}', "the source of 'a' is not a model"),
    ],
)
def test_an_invalid_mapping_is_rejected(value: str, message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        ServerSettings.from_environment({"ZETA_OPENAI_MODELS": value, "ZETA_WORKER_SECRET": "s"})


def test_models_from_every_source_are_accepted() -> None:
    value = '{"a": "org/name@main", "b": {"job": "job_00000000000000000000"}, "c": {"config": {"model_type": "llama"}}}'
    settings = ServerSettings.from_environment({"ZETA_OPENAI_MODELS": value, "ZETA_WORKER_SECRET": "s"})
    assert settings.openai_base_models["a"] == "org/name@main"
    assert list(settings.openai_base_models) == ["a", "b", "c"]
