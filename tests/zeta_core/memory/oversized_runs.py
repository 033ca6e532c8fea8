"""Start runs that cannot fit in memory, then train each one with the suggested patch: ``oversized_runs.py FOLDER``.

Run it with a small memory limit, such as in a control group of `tests.harness.memory_cgroup`. It writes one JSON object
per run to ``FOLDER/outcomes.jsonl``: the error code, the patch, the detected capacity, and the steps trained with the
patch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.zeta_core.advice_runs import apply_patch, train
from tests.zeta_core.models import llama
from zeta_core.failures import OutOfMemory

NARROW = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def train_with_patches(folder: Path, model: object, spec: dict[str, Any]) -> dict[str, Any]:
    try:
        train(folder, model, spec)
    except OutOfMemory as error:
        outcome, _ = train(folder, model, apply_patch(spec, error.patch))
        seen = {"code": error.code, "patch": error.patch, "capacity": error.evidence["capacity_bytes"]}
        return {**seen, "steps_trained": outcome.steps_trained}
    return {"code": None}


def main(folder: Path) -> None:
    # All logits of 40 sequences and the temporary arrays of their loss would take 2.6 GB.
    batch = {"seq_len": 256, "batch_size": 40, "gradient_accumulate_every": 1, "max_steps": 1}
    outcomes = [train_with_patches(folder, llama(**NARROW, vocab_size=32_000), batch)]
    # 0.66 GB of weights, three times as much for full fine-tuning, and almost nothing for an adapter.
    wide: Any = llama(**{**NARROW, "hidden_size": 512}, vocab_size=320_000, tie_word_embeddings=True)
    wide.to(torch.bfloat16).save_pretrained(folder / "wide")
    del wide
    short = {"seq_len": 16, "batch_size": 1, "max_steps": 1, "learning_rate": 1e-4}
    outcomes.append(train_with_patches(folder, str(folder / "wide"), short))
    (folder / "outcomes.jsonl").write_text("".join(json.dumps(outcome) + "\n" for outcome in outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
