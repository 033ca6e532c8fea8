"""The workload of all contestants: the same model, token file, order of batches, and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.wire.run_directory import STOP_FILE
from zeta_core.data.sequences import Sampler
from zeta_core.data.sources import SourceLocations
from zeta_core.environment import ProcessRank
from zeta_core.report.journal_writer import JournalWriter
from zeta_core.report.reporter import Reporter
from zeta_core.run import Outcome, RunRequest, execute

SEED = 42
LEARNING_RATE, WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 3e-4, 0.1, (0.9, 0.95), 1.0
SMALL_VOCABULARY = 384  # bytes and a few special tokens
NEVER = 10**9  # more steps than any run here has


@dataclass(frozen=True)
class Size:
    """The size of a workload. The targets apply to the full size; the small one only tests that the benchmarks run."""

    rounds: int
    steps: int  # measured in each round, after `WARM_UP_STEPS`
    large: bool
    isolated: bool  # each contestant has its own process

    def of(self, full: int, small: int) -> int:
        return full if self.large else small


FULL = Size(rounds=4, steps=8, large=True, isolated=True)
SMALL = Size(rounds=1, steps=2, large=False, isolated=False)
WARM_UP_STEPS = 2


def llama(size: Size, **changes: Any) -> nn.Module:
    """6.8 million parameters: hidden 256, 6 layers, vocabulary 4,096. Much smaller for a small size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "vocab_size": 4096,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    if not size.large:
        changes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        changes["vocab_size"] = SMALL_VOCABULARY
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def token_file(folder: Path, *, num_tokens: int, vocab_size: int) -> Path:
    """A file of one document: ids below ``vocab_size``, with a Zipf distribution like that of natural language."""
    generator = np.random.default_rng(SEED)
    drawn = np.minimum(generator.zipf(1.2, num_tokens), vocab_size) - 1
    file = folder / f"tokens-{num_tokens}.npy"
    np.save(file, drawn.astype(np.uint16))
    return file


def batches(tokens: Path, *, seq_len: int, batch_size: int, steps: int) -> list[torch.Tensor]:
    """The batches that this project trains on with this file, in the same order."""
    ids = np.load(tokens, mmap_mode="r")
    sampler = Sampler(len(ids) // seq_len, SEED)
    rows = sampler.sequences(0, batch_size * steps)
    blocks = torch.from_numpy(np.stack([ids[row * seq_len : (row + 1) * seq_len] for row in rows]).astype(np.int64))
    return list(blocks.split(batch_size))


def train_zeta(
    model: nn.Module,
    folder: Path,
    *,
    dataset: Path | None = None,
    stop: Callable[[], Any] | None = None,
    tokenizer: object = None,
    resume_from: Path | None = None,
    **options: Any,
) -> Outcome:
    """Run this project's training like a job, with a journal, a stop file and an output directory.

    By default, only the final checkpoint is saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "gradient_accumulate_every": 1,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_GRAD_NORM,
        "checkpointing_steps": NEVER,
        "seed": SEED,
        "use_pretokenized": dataset is not None and dataset.suffix == ".npy",
        **options,
    }
    if dataset is not None:
        settings["dataset"] = {"path": str(dataset)}
    request = RunRequest(
        options=TrainerOptions.model_validate(settings),
        model=model,
        output_dir=folder / "output",
        cache=folder / "cache",
        locations=SourceLocations(any_path=True),
        tokenizer=tokenizer,
        resume_from=resume_from,
        stop=stop if stop is not None else lambda: "cancel" if (folder / STOP_FILE).exists() else None,
    )
    report = Reporter(JournalWriter(folder / "events.jsonl"))
    try:
        return execute(request, ProcessRank(), report)
    finally:
        report.close()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The same optimizer as this project uses."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    not_decayed = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": not_decayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, max(1, round(0.03 * steps)), steps)


def trainer_arguments(folder: Path, *, batch_size: int, steps: int, **changes: Any) -> Any:
    """Arguments of `transformers.Trainer` for the same work, without saving, logging or trackers."""
    from transformers import TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "cosine",
        "max_grad_norm": MAX_GRAD_NORM,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "seed": SEED,
    }
    return TrainingArguments(**{**settings, **changes})


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The rows of ``batches``, for a `DataLoader` that puts them together again."""

    def __init__(self, batches: Sequence[torch.Tensor]) -> None:
        self._rows = torch.cat(list(batches))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}
