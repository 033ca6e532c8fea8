"""Real conversations from a package (chitchat-dataset, MIT). The first speaker is the user."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


def real_conversations(count: int) -> list[list[dict[str, str]]]:
    """``count`` short conversations that end with an assistant's turn. Skips the test if the package is missing."""
    found = find_spec("chitchat_dataset")
    if found is None or found.origin is None:
        pytest.skip("chitchat-dataset is not installed (pip install --no-deps chitchat-dataset)")
    stored: dict[str, Any] = json.loads((Path(found.origin).parent / "dataset.json").read_text())
    conversations: list[list[dict[str, str]]] = []
    for conversation in stored.values():
        texts = ["\n".join(message["text"] for message in turn) for turn in conversation["messages"][:4]]
        if len(texts) == 4 and all(text.strip() for text in texts) and sum(map(len, texts)) < 350:
            roles = ("user", "assistant", "user", "assistant")
            conversations.append([{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)])
        if len(conversations) == count:
            break
    return conversations


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
