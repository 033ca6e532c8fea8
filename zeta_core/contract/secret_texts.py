"""Finds and masks texts that look like secrets: API keys, tokens, private keys, and passwords in URLs.

Logs, errors and events are masked. A spec with such a text is rejected, because it is stored and shown to everyone in
the project. Only forms that other texts don't have are recognized; a password without such a form is not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

MASK = "***"
# By what they are. The forms are those that the services document, so that they can be found in leaked texts.
_TOKENS = {
    "an API key of this service": r"\bzeta_[A-Za-z0-9_-]{20,}",
    "a token of the Hugging Face Hub": r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}",
    "an API key of OpenAI or a similar service": r"\bsk-[A-Za-z0-9_-]{20,}",
    "an access key of AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{36,})",
    "a token of GitLab": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an API key of Google": r"\bAIza[A-Za-z0-9_-]{35}",
    "a token of Slack": r"\bxox[abeprs]-[A-Za-z0-9-]{10,}",
    "a signing secret of a webhook": r"\bwhsec_[A-Za-z0-9+/=]{24,}",
    "a private key": r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[A-Za-z0-9+/=\s]*",
}
_IN_A_URL = r"://[^\s:/@]*:[^\s/@'\"]+@"
_FOUND = re.compile("|".join(f"({pattern})" for pattern in (*_TOKENS.values(), _IN_A_URL)))
_KINDS = (*_TOKENS, "a password in a URL")
_MASKED = re.compile(
    rf"(?P<before>\bBearer\s+|://[^\s:/@]*:)(?P<secret>[^\s@'\"]+)(?P<after>@?)|{'|'.join(_TOKENS.values())}"
)


def masked(text: str) -> str:
    """``text`` with `MASK` in place of secrets and bearer tokens. The user name and host of a URL are kept."""
    return _MASKED.sub(_mask, text)


def masked_values(value: Any) -> Any:
    """JSON data with `masked` values; the names of fields are kept."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {name: masked_values(item) for name, item in value.items()}
    if isinstance(value, list):
        return [masked_values(item) for item in value]
    return value


def find_secrets(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The path of each text in JSON data that contains a secret, such as ``metadata.note``, and what the secret is.

    A secret in the name of a field is reported for the object that contains it.
    """
    if isinstance(data, str):
        if (match := _FOUND.search(data)) is not None and match.lastindex is not None:
            yield path, _KINDS[match.lastindex - 1]
    elif isinstance(data, dict):
        for name, item in data.items():
            inside = list(find_secrets(str(name), path))
            yield from inside or find_secrets(item, f"{path}.{name}" if path else str(name))
    elif isinstance(data, list):
        for number, item in enumerate(data):
            yield from find_secrets(item, f"{path}.{number}" if path else str(number))


def _mask(match: re.Match[str]) -> str:
    before = match["before"]
    if before is None:
        return MASK
    if before.startswith("://") and not match["after"]:
        return match[0]  # the port of a URL without a password
    return f"{before}{MASK}{match['after']}"
