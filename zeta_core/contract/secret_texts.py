"""Finds and masks secrets in texts: API keys, tokens, private keys, and passwords in URLs.

Logs, errors and events are masked. A spec with such a text is rejected, because it is stored and shown to everyone in
the project. Only unambiguous formats are recognized, so a plain password is not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

MASK = "***"
# The kind of secret, its prefixes, and its format as documented by its service.
_TOKENS = (
    ("an API key of this service", ("zeta_",), r"\bzeta_[A-Za-z0-9_-]{20,}"),
    ("a token of the Hugging Face Hub", ("hf_", "api_org_"), r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    ("an API key of OpenAI or a similar service", ("sk-",), r"\bsk-[A-Za-z0-9_-]{20,}"),
    ("an access key of AWS", ("AKIA", "ASIA"), r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    ("a token of GitHub", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"\bgh[pousr]_[A-Za-z0-9]{36,}"),
    ("a token of GitHub", ("github_pat_",), r"\bgithub_pat_[A-Za-z0-9_]{36,}"),
    ("a token of GitLab", ("glpat-",), r"\bglpat-[A-Za-z0-9_-]{20,}"),
    ("an API key of Google", ("AIza",), r"\bAIza[A-Za-z0-9_-]{35}"),
    ("a token of Slack", ("xox",), r"\bxox[abeprs]-[A-Za-z0-9-]{10,}"),
    ("a signing secret of a webhook", ("whsec_",), r"\bwhsec_[A-Za-z0-9+/=]{24,}"),
    ("a private key", ("-----BEGIN",), r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[A-Za-z0-9+/=\s]*"),
)
_IN_A_URL = ("a password in a URL", ("://",), r"://[^\s:/@]*:[^\s/@'\"]+@")
_FORMATS = [
    (prefix, re.compile(pattern), kind) for kind, prefixes, pattern in (*_TOKENS, _IN_A_URL) for prefix in prefixes
]
_PREFIXES = ("Bearer", *(prefix for prefix, _, _ in _FORMATS))
_PREFIX = re.compile("|".join(map(re.escape, _PREFIXES)))
_SHORT = 128  # characters; in longer texts a search for each prefix takes at most 0.01 ms per 1,000 characters
_MASKED = re.compile(
    r"(?P<before>\bBearer\s+|://[^\s:/@]*:)(?P<secret>[^\s@'\"]+)(?P<after>@?)|"
    + "|".join(pattern for _, _, pattern in _TOKENS)
)

_NUMBERS = (int, float)  # most values of an event; a call for each would take longer than everything else


def may_contain_secrets(text: str) -> bool:
    """Whether a text, or JSON data as text, contains the prefix of a secret; much faster than finding one."""
    if len(text) < _SHORT:  # one search for all prefixes is faster, unless many characters begin one
        return _PREFIX.search(text) is not None
    return any(prefix in text for prefix in _PREFIXES)


def masked(text: str) -> str:
    """``text`` with `MASK` in place of secrets and bearer tokens. The user name and host of a URL are kept."""
    return _MASKED.sub(_mask, text) if may_contain_secrets(text) else text


def masked_values(value: Any) -> Any:
    """JSON data with `masked` values; the names of fields are kept."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {name: item if type(item) in _NUMBERS else masked_values(item) for name, item in value.items()}
    if isinstance(value, list):
        return [masked_values(item) for item in value]
    return value


def find_secrets(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The path of each text in JSON data that contains a secret, such as ``metadata.note``, and what the secret is.

    A secret in the name of a field is reported for the object that contains it.
    """
    if isinstance(data, str):
        if (kind := _kind_of_secret(data)) is not None:
            yield path, kind
    elif isinstance(data, dict):
        for name, item in data.items():
            inside = list(find_secrets(str(name), path))
            yield from inside or find_secrets(item, f"{path}.{name}" if path else str(name))
    elif isinstance(data, list):
        for number, item in enumerate(data):
            yield from find_secrets(item, f"{path}.{number}" if path else str(number))


def _kind_of_secret(text: str) -> str | None:
    """The kind of a secret in the text, or ``None``. Takes time proportional to the length of the text."""
    for prefix, secret_format, kind in _FORMATS:
        start = text.find(prefix)
        while start >= 0:
            if secret_format.match(text, start) is not None:
                return kind
            start = text.find(prefix, start + 1)
    return None


def _mask(match: re.Match[str]) -> str:
    before = match["before"]
    if before is None:
        return MASK
    if before.startswith("://") and not match["after"]:
        return match[0]  # the port of a URL without a password
    return f"{before}{MASK}{match['after']}"
