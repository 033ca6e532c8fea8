"""Texts that look like secrets are found and masked; others are not."""

from typing import Any

import pytest

from zeta_core.contract.errors import ErrorDetail, InvalidSpec
from zeta_core.contract.secret_texts import find_secrets, masked, masked_values

SECRETS = {
    "hf_" + "a" * 34: "a token of the Hugging Face Hub",
    "sk-proj-" + "a1" * 20: "an API key of OpenAI or a similar service",
    "AKIA" + "ABCD" * 4: "an access key of AWS",
    "ghp_" + "a" * 36: "a token of GitHub",
    "glpat-" + "a" * 20: "a token of GitLab",
    "zeta_" + "a" * 30: "an API key of this service",
    "whsec_" + "aB1+" * 8: "a signing secret of a webhook",
    "-----BEGIN RSA PRIVATE KEY-----": "a private key",
    "s3://me:secret@bucket/data": "a password in a URL",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer ***"),
        ("redis://:pass/word@127.0.0.1:6379/0 is unreachable", "redis://:***@127.0.0.1:6379/0 is unreachable"),
        ("postgresql://zeta:secret@db:5432/zeta", "postgresql://zeta:***@db:5432/zeta"),
        ("the key zeta_KTLmFabcdefghijklmnop-_1 is unknown", "the key *** is unknown"),
        ("the token hf_abcdefghijklmnopqrstuv", "the token ***"),
        ("Serving on http://127.0.0.1:8400.", "Serving on http://127.0.0.1:8400."),
        ("zeta_core failed in zeta_core/run/execution.py", "zeta_core failed in zeta_core/run/execution.py"),
        ("A bearer of news; see https://example.org/a@b", "A bearer of news; see https://example.org/a@b"),
    ],
)
def test_secrets_are_masked_and_other_texts_unchanged(text: str, expected: str) -> None:
    assert masked(text) == expected


@pytest.mark.parametrize(("secret", "kind"), SECRETS.items())
def test_a_secret_is_found_where_it_is(secret: str, kind: str) -> None:
    body = {"metadata": {"note": f"use {secret} here"}, "prompts": ["a", secret], "seed": 1}
    assert list(find_secrets(body)) == [("metadata.note", kind), ("prompts.1", kind)]
    assert list(find_secrets({"metadata": {secret: "x"}})) == [("metadata", kind)]
    assert secret not in str(masked_values(body))


@pytest.mark.parametrize(
    "text",
    [
        "Bearer of bad news",
        "https://example.org:8080/a@b",
        "sk-learn",
        "hf_hub_download",
        "AKIAlike",
        "task-force-of-20-people",
    ],
)
def test_ordinary_texts_are_not_secrets(text: str) -> None:
    assert list(find_secrets({"name": text})) == []


def test_an_error_never_contains_a_secret() -> None:
    secret = next(iter(SECRETS))
    detail = ErrorDetail(param=f"metadata.{secret}", message=f"It is {secret}.", code="c", suggestion=secret)
    error: Any = InvalidSpec(f"It is {secret}.", param=secret, details=[detail])
    assert secret not in error.body().model_dump_json()
