"""The text of an estimate, as `zeta validate` prints it."""

from __future__ import annotations

import re

from zeta.cli.output import duration, size
from zeta_core.contract.job.check import CheckedData
from zeta_core.contract.job.estimate import Estimate


def estimate_rows(estimate: Estimate) -> list[tuple[str, object]]:
    """The names and values of an estimate. An unknown value is replaced by the reason why it is unknown."""
    steps = _count(estimate.steps)
    if steps is not None and estimate.counted_by:
        steps += f" (counted by {estimate.counted_by} on the same data)"
    values = {
        "data": None if estimate.data is None else _data(estimate.data),
        "parameters": _count(estimate.parameters),
        "trainable_parameters": _count(estimate.trainable_parameters),
        "steps": steps,
        "tokens": _count(estimate.tokens),
        "memory": None
        if estimate.memory is None
        else f"{size(estimate.memory.bytes)} {_with_sizes(estimate.memory.meaning)}",
        "disk": None if estimate.disk is None else f"{size(estimate.disk.bytes)}: {_with_sizes(estimate.disk.meaning)}",
        "time": None if estimate.time is None else f"{duration(estimate.time.seconds)} {estimate.time.meaning}",
    }
    return [
        (name.replace("_", " "), _unknown(estimate.pending.get(name)) if value is None else value)
        for name, value in values.items()
    ]


def _unknown(reason: str | None) -> str:
    if not reason:
        return "Unknown."
    return reason if reason.startswith("Unknown") else f"Unknown: {reason}"


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _with_sizes(text: str) -> str:
    """The text with numbers of bytes as sizes, such as ``1.5 MiB``."""
    return re.sub(r"\b(\d+) bytes?\b", lambda match: size(int(match[1])), text)


def _data(data: CheckedData) -> str:
    """The checked rows in one line."""
    rows = "1 row" if data.rows == 1 else f"{data.rows:,} rows"
    tokens = "1 token" if data.tokens == 1 else f"{data.tokens:,} tokens"
    kind = ", ".join(data.shapes or data.formats)
    text = f"{rows} ({kind}), about {tokens}, {data.trained_share:.0%} trained on"
    if data.too_long_share:
        text += f"; {data.too_long_share:.0%} of documents exceed seq_len"
    if data.unused_columns:
        text += f"; columns not used: {', '.join(data.unused_columns)}"
    return text if data.note is None else f"{text}. {data.note}"
