"""Trains the same tiny models under several strategies in one launch, and writes the results as JSON.

``parallel_script.py RESULT_FILE CASE...``: each case is a JSON object of `Trainer` keywords and ``name``, ``model``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.zeta_core.models import experts, llama, mixture, plain, routed, skipping
from zeta import Trainer

MODELS: dict[str, Any] = {
    "plain": plain,
    "dropout": lambda: plain(dropout=0.2),
    "skipping": skipping,
    "routed": routed,
    "experts": experts,
    "large vocabulary": lambda: llama(vocab_size=200_000),  # its loss is computed in chunks
    "mixture": lambda: mixture("mixtral"),
    "tied llama": lambda: llama(tie_word_embeddings=True),
}


def main(result_file: str, *cases: str) -> None:
    results: dict[str, Any] = {}
    for case in cases:
        options: dict[str, Any] = json.loads(case)
        name = options.pop("name")
        model = MODELS[options.pop("model")]()
        result = Trainer(model=model, seq_len=32, learning_rate=1e-2, seed=42, **options)
        results[name] = {
            "loss": result.train_loss,
            "eval_loss": result.eval_loss,
            "steps_trained": result.steps_trained,
            "weight": float(torch.cat([p.detach().double().flatten() for p in model.parameters()]).abs().sum()),
        }
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(result_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
