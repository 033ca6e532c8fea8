"""Training data in OpenAI's formats."""

import json
from collections.abc import Sequence
from typing import Any

from openai import OpenAI


def conversations(number: int = 12, *, start: int = 0) -> bytes:
    """JSON Lines with one short conversation per line."""
    return b"".join(_line(_conversation(index)) for index in range(start, start + number))


def preferences(number: int = 12) -> bytes:
    """JSON Lines with pairs of answers, as OpenAI's method ``dpo`` reads them."""
    return b"".join(
        _line(
            {
                "input": {"messages": [{"role": "user", "content": f"Question {index}?"}]},
                "preferred_output": [{"role": "assistant", "content": f"Good answer {index}."}],
                "non_preferred_output": [{"role": "assistant", "content": f"Bad answer {index}."}],
            }
        )
        for index in range(number)
    )


def upload(client: OpenAI, content: bytes | None = None, name: str = "train.jsonl") -> str:
    """The id of an uploaded training file."""
    return client.files.create(file=(name, content or conversations()), purpose="fine-tune").id


def lines(rows: Sequence[Any]) -> bytes:
    return b"".join(_line(row) for row in rows)


def _conversation(index: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": "You count."},
            {"role": "user", "content": f"What follows {index}?"},
            {"role": "assistant", "content": f"{index + 1} follows {index}."},
        ]
    }


def _line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"
