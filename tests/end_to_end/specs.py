"""Specs of small real jobs."""

import json
from pydoc_data.topics import topics
from typing import Any

TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 128,
}

PYTHON_REFERENCE = "\n\n".join(topics.values())  # half a megabyte of real English in every CPython


def tiny_job(**changes: Any) -> dict[str, Any]:
    """A job of a few seconds on the Python language reference."""
    return {
        "model": {"config": TINY_LLAMA},
        "dataset": {"builtin": "python-docs"},
        "seq_len": 64,
        "batch_size": 4,
        "gradient_accumulate_every": 1,
        "learning_rate": 0.003,
        "max_steps": 8,
        "checkpointing_steps": 4,
        "seed": 7,
        **changes,
    }


def endless_job(**changes: Any) -> dict[str, Any]:
    """A job that runs until it is stopped."""
    return tiny_job(max_steps=1_000_000, checkpointing_steps=1_000_000, **changes)


def as_jsonl(text: str) -> bytes:
    """Text as documents of one paragraph each, in JSON lines."""
    return b"".join(json.dumps({"text": part}).encode() + b"\n" for part in text.split("\n\n") if part.strip())
