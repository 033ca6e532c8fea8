"""Advice for a run that failed or has a problem: a hint for people and a patch of its spec for programs.

A patch is a JSON merge patch (RFC 7396) of the submitted spec: objects are merged by name, and null removes a field. It
can be applied unchanged (``POST /v1/jobs/{id}/rerun``, `rerun_command`), and changes as little as possible.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue

Patch = dict[str, JsonValue]

_PLAIN_WORD = re.compile(r"[A-Za-z][\w./-]*")

MIN_SEQ_LEN = 128  # tokens; halving a shorter seq_len frees little memory, and leaves little context to learn from
NO_LESS_MEMORY = (
    "A smaller batch or shorter sequences would not help: train an adapter with lora, train a smaller model, use "
    "use_fsdp on more devices, or use a machine with more memory."
)


@dataclass(frozen=True)
class Suggestion:
    """A change to try: as text and, if it is known exactly, as a patch of the spec."""

    hint: str
    patch: Patch | None = None


class Advice(BaseModel):
    """A finding about a run. ``code`` is stable, and ``evidence`` contains measurements."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    hint: str | None = None
    patch: Patch | None = None
    evidence: dict[str, JsonValue] = {}


def suggest_less_memory(options: Mapping[str, Any]) -> Suggestion:
    """The least harmful change that saves memory; ``options`` are the resolved options of the run.

    First, half the micro-batch with the same global batch (equal results up to rounding); then recomputing activations
    (slower, equal results); last, half the tokens per sequence (different results).
    """
    batch_size, accumulate = options.get("batch_size") or 1, options.get("gradient_accumulate_every") or 1
    if batch_size > 1:
        half, more = split_into_smaller(batch_size * accumulate, batch_size // 2)
        hint = f"Use batch_size {half} with gradient_accumulate_every {more}: the global batch stays the same."
        return Suggestion(hint, {"batch_size": half, "gradient_accumulate_every": more})
    if options.get("use_activation_checkpointing") in (None, False, "selective"):
        hint = "Set use_activation_checkpointing: activations are recomputed instead of being kept in memory."
        return Suggestion(hint, {"use_activation_checkpointing": True})
    seq_len = options.get("seq_len") or 0
    if seq_len >= 2 * MIN_SEQ_LEN:
        return Suggestion(f"Use sequences of {seq_len // 2} tokens instead of {seq_len}.", {"seq_len": seq_len // 2})
    return Suggestion(NO_LESS_MEMORY)


def split_into_smaller(sequences: int, most: int) -> tuple[int, int]:
    """``(batch_size, gradient_accumulate_every)`` with the product ``sequences`` and a batch of at most ``most``."""
    size = next(size for size in range(max(1, min(most, sequences)), 0, -1) if sequences % size == 0)
    return size, sequences // size


def set_options(patch: Mapping[str, Any]) -> list[str]:
    """The patch as arguments of ``--set``, such as ``lora.r=8``; values are YAML 1.2, where ``no`` is a string."""
    return [f"{name}={_as_yaml(value)}" for name, value in _leaves(patch, "")]


def rerun_command(job_id: str, patch: Mapping[str, Any]) -> str:
    """The shell command that reruns the job with ``patch``."""
    settings = (f"--set {shlex.quote(setting)}" for setting in set_options(patch))
    return " ".join((f"zeta rerun {job_id}", *settings))


def advice_text(message: str, hint: str | None, patch: Mapping[str, Any] | None, job_id: str | None = None) -> str:
    """Message, hint and patch as text. The patch is shown as a command for a job, or as arguments for a script."""
    sentences = [message, hint or ""]
    if patch:
        sentences.append(f"Apply it: {rerun_command(job_id, patch)}" if job_id else f"Set {_keywords(patch)}.")
    return " ".join(sentence for sentence in sentences if sentence)


def _keywords(patch: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in patch.items())


def _as_yaml(value: Any) -> str:
    plain = isinstance(value, str) and _PLAIN_WORD.fullmatch(value) and value.lower() not in ("true", "false", "null")
    return value if plain else json.dumps(value)  # JSON is YAML, too


def _leaves(patch: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in patch.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
