"""Trains a small Llama on several ranks, and lets memory run out on rank 1; writes the results as JSON.

``memory_script.py RESULT_FILE CASE...``: each case is a JSON object of `Trainer` keywords and ``name``. With
``fails_in`` ("forward" or "backward"), memory runs out in the second block with more than ``most_rows`` rows, and with
``after_updates``, only after so many updates.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.zeta_core.models import llama
from zeta import Trainer
from zeta_core.environment import ProcessRank
from zeta_core.failures import OutOfMemory

SEQ_LEN = 32


def limit_rows(model: Any, when: str, most_rows: int, after_updates: int) -> None:
    """Raise on rank 1, as an allocation on a GPU does."""
    updates = 0

    def count(*_: Any) -> None:
        nonlocal updates
        updates += 1

    register_optimizer_step_post_hook(count)

    def check(block: nn.Module, values: tuple[Any, ...]) -> None:
        rows, length = next(value for value in values if isinstance(value, torch.Tensor)).shape[:2]
        is_step = block.training and length == SEQ_LEN and updates >= after_updates
        if is_step and rows > most_rows and ProcessRank.from_environment().rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    block = model.model.layers[1]
    if when == "forward":
        block.register_forward_pre_hook(check)
    else:
        block.register_full_backward_pre_hook(check)


def train(options: dict[str, Any]) -> dict[str, Any]:
    name, when = options.pop("name"), options.pop("fails_in", None)
    most_rows, after_updates = options.pop("most_rows", 0), options.pop("after_updates", 0)
    model = llama(attention_dropout=0.2)
    if when is not None:
        limit_rows(model, when, most_rows, after_updates)
    folder = Path(name.replace(" ", "-"))
    values: dict[str, Any] = {"seq_len": SEQ_LEN, "learning_rate": 1e-2, "seed": 42, "max_steps": 3, **options}
    try:
        result = Trainer(model=model, output_dir=folder, **values)
    except OutOfMemory as error:
        return {"error": str(error)}
    state = json.loads((folder / "final" / "training_state" / "state.json").read_text())
    weights = (folder / "final" / "model.safetensors").read_bytes()
    return {
        "loss": result.train_loss,
        "weights": hashlib.sha256(weights).hexdigest(),
        "split": [state["plan"]["batch_size"], state["plan"]["gradient_accumulate_every"]],
    }


def main(result_file: str, *cases: str) -> None:
    results = {json.loads(case)["name"]: train(json.loads(case)) for case in cases}
    if dist.get_rank() == 0:
        Path(result_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
