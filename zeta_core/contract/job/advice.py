"""What to do about a run that failed or goes wrong: a hint for people, a patch of its spec for programs.

A patch is a JSON merge patch (RFC 7396) over the spec as it was sent: objects are merged by name, null removes. It can
be applied as it stands (``POST /v1/jobs/{id}/rerun``, `rerun_command`), and changes no more than it must.
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

SHORTEST_SEQ_LEN = 128  # tokens; below it halving seq_len frees little, and leaves little to learn from
NO_LESS_MEMORY = (
    "No smaller batch or shorter sequence would help: train an adapter with lora, a smaller model, with use_fsdp on "
    "more devices, or on a machine with more memory."
)


@dataclass(frozen=True)
class Cure:
    """What can be changed, in words and, where a change is known, as a patch of the spec."""

    hint: str
    patch: Patch | None = None


class Advice(BaseModel):
    """Something unusual about a run: ``code`` is stable, ``evidence`` is what was measured."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    hint: str | None = None
    patch: Patch | None = None
    evidence: dict[str, JsonValue] = {}


def less_memory(options: Mapping[str, Any]) -> Cure:
    """The next thing to do about memory, the least harmful first; ``options`` are the resolved ones of the run.

    Half the micro-batch with the same global batch (the same numbers up to rounding); activations that are computed
    again (slower, the same numbers); at last half the tokens of a sequence (other numbers).
    """
    batch_size, accumulate = options.get("batch_size") or 1, options.get("gradient_accumulate_every") or 1
    if batch_size > 1:
        half, more = split_into_smaller(batch_size * accumulate, batch_size // 2)
        hint = f"Use batch_size {half} with gradient_accumulate_every {more}: the global batch stays the same."
        return Cure(hint, {"batch_size": half, "gradient_accumulate_every": more})
    if not options.get("use_activation_checkpointing"):
        hint = "Use use_activation_checkpointing: activations are computed again instead of being kept."
        return Cure(hint, {"use_activation_checkpointing": True})
    seq_len = options.get("seq_len") or 0
    if seq_len >= 2 * SHORTEST_SEQ_LEN:
        return Cure(f"Use sequences of {seq_len // 2} tokens instead of {seq_len}.", {"seq_len": seq_len // 2})
    return Cure(NO_LESS_MEMORY)


def split_into_smaller(sequences: int, most: int) -> tuple[int, int]:
    """``(batch_size, gradient_accumulate_every)`` whose product is ``sequences``, with at most ``most`` at once."""
    size = next(size for size in range(max(1, min(most, sequences)), 0, -1) if sequences % size == 0)
    return size, sequences // size


def settings_of(patch: Mapping[str, Any]) -> list[str]:
    """The patch as the ``k.l=v`` that ``--set`` reads as YAML 1.2, where a plain word is a string and ``no`` is one."""
    return [f"{name}={_as_yaml(value)}" for name, value in _leaves(patch, "")]


def rerun_command(job_id: str, patch: Mapping[str, Any]) -> str:
    """What a person types to run the job again with ``patch``."""
    settings = (f"--set {shlex.quote(setting)}" for setting in settings_of(patch))
    return " ".join((f"zeta rerun {job_id}", *settings))


def in_words(message: str, hint: str | None, patch: Mapping[str, Any] | None, job_id: str | None = None) -> str:
    """Everything in sentences, with the command that applies the patch to a job, or its settings for a script."""
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
