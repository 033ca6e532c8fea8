"""Tokens per second on real documents, each side with its best settings: training, LoRA, and evaluation.

The documents, the model and the optimizer are those of `benchmarks.mixed_documents`. This project packs documents. For
`transformers.Trainer`, two arrangements are measured: batches of similar length with padding, and its padding-free
batches (`DataCollatorWithFlattening`). Each round is compared with the faster one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks import workload
from benchmarks.contestants import run_in_turns
from benchmarks.evaluation import EvaluationClock, timed
from benchmarks.lora import ALPHA, RANK
from benchmarks.mixed_documents import BATCH_SIZE, SEQ_LEN, VOCABULARY, paragraphs
from benchmarks.result import ZETA, BenchmarkResult, ratio_of_rounds
from benchmarks.stopwatch import Stopwatch
from benchmarks.workload import WARM_UP_STEPS, Size

Work = Literal["training", "lora", "evaluation"]
GROUPED, PADDING_FREE = "Trainer, grouped by length", "Trainer, padding-free"
TARGETS: dict[Work, float] = {"training": 1.15, "lora": 1.05, "evaluation": 1.05}
TITLES: dict[Work, str] = {"training": "Training", "lora": "LoRA", "evaluation": "Evaluation"}
NUM_EVALUATED = 600  # documents


def run_zeta(work: Work, size: Size, folder: Path) -> float:
    """This project's tokens per second."""
    from transformers import ByT5Tokenizer

    documents = paragraphs()
    steps = _steps(size)
    options: dict[str, Any] = {"max_steps": 2 if work == "evaluation" else steps}
    if work == "lora":
        options["lora"] = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0, "target_modules": "all-linear"}
    if work == "evaluation":
        held_out = _write(folder / "held-out.jsonl", documents[: _num_evaluated(size)])
        options |= {"eval_dataset": {"path": str(held_out)}, "eval_steps": 2}
        documents = documents[_num_evaluated(size) :]
    model, stopwatch = workload.llama(size, vocab_size=VOCABULARY), Stopwatch(skip=WARM_UP_STEPS)

    def train() -> int:
        outcome = workload.train_zeta(
            model,
            folder / "zeta",
            dataset=_write(folder / "documents.jsonl", documents),
            tokenizer=ByT5Tokenizer(),
            seq_len=size.of(SEQ_LEN, 64),
            batch_size=BATCH_SIZE,
            **options,
        )
        return outcome.progress.num_targets

    if work == "evaluation":
        with timed(model) as clock:
            train()
        return _num_targets(rows(size, _num_evaluated(size))) / clock.seconds
    with stopwatch.running(model):
        trained = train()
    return trained / steps * len(stopwatch.steps) / sum(step.wall for step in stopwatch.steps)


def run_trainer(work: Work, size: Size, folder: Path, *, padding_free: bool) -> float:
    """The tokens per second of `transformers.Trainer`."""
    from transformers import ByT5Tokenizer, DataCollatorForLanguageModeling, DataCollatorWithFlattening, Trainer

    collate: Any = (
        DataCollatorWithFlattening() if padding_free else DataCollatorForLanguageModeling(ByT5Tokenizer(), mlm=False)
    )
    trained: list[int] = []

    def count_and_collate(examples: list[dict[str, Any]]) -> Any:
        trained.append(_num_targets(examples))
        return collate(examples)

    steps = _steps(size)
    evaluated = _num_evaluated(size) if work == "evaluation" else 0
    all_rows: Any = rows(size)
    # Padded batches of similar length have the least padding; without padding, the order makes no difference.
    arguments = workload.trainer_arguments(
        folder / "trainer",
        batch_size=BATCH_SIZE,
        steps=2 if evaluated else steps,
        per_device_eval_batch_size=BATCH_SIZE,
        prediction_loss_only=True,
        train_sampling_strategy="random" if padding_free else "group_by_length",
    )
    model: Any = workload.llama(size, vocab_size=VOCABULARY)
    if work == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    stopwatch = Stopwatch(skip=WARM_UP_STEPS)
    with stopwatch.running(model):
        held_out: Any = rows(size, evaluated) if evaluated else None
        trainer = Trainer(
            model=model, args=arguments, train_dataset=all_rows, eval_dataset=held_out, data_collator=count_and_collate
        )
        trainer.train()
    if not evaluated:
        return sum(trained[WARM_UP_STEPS:steps]) / sum(step.wall for step in stopwatch.steps)
    clock = EvaluationClock()
    with clock.running(model):
        trainer.evaluate()
    return _num_targets(held_out) / clock.seconds


def rows(size: Size, num_documents: int | None = None) -> list[dict[str, list[int]]]:
    """The token ids of the first documents, or of all; longer ones than a sequence are split."""
    max_length = size.of(SEQ_LEN, 64)
    ids = [[byte + 3 for byte in document.encode()] + [1] for document in paragraphs()[:num_documents]]
    parts = (row[at : at + max_length] for row in ids for at in range(0, len(row), max_length))
    return [{"input_ids": part} for part in parts if len(part) > 1]


def measure(work: Work, size: Size) -> BenchmarkResult:
    contestants: dict[str, Callable[[Size, Path], float]] = {
        ZETA: partial(run_zeta, work),
        GROUPED: partial(run_trainer, work, padding_free=False),
        PADDING_FREE: partial(run_trainer, work, padding_free=True),
    }
    speed: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(max(1, size.rounds - 1)):
        with tempfile.TemporaryDirectory() as folder:
            tasks = {name: partial(run, size, _created(Path(folder) / name)) for name, run in contestants.items()}
            for name, tokens_per_second in run_in_turns(size, tasks).items():
                speed[name].append(tokens_per_second)
    best = [max(pair) for pair in zip(speed[GROUPED], speed[PADDING_FREE], strict=True)]
    return BenchmarkResult(
        title=f"{TITLES[work]} at best settings on real documents, relative to transformers.Trainer at its best",
        unit="tokens/s",
        figures=speed,
        ratio=ratio_of_rounds(speed[ZETA], best),
        target=TARGETS[work],
        target_is="minimum",
        notes=f"Paragraphs of at most {SEQ_LEN} tokens, {BATCH_SIZE} sequences or documents per batch.",
    )


def _steps(size: Size) -> int:
    return 2 * size.steps + WARM_UP_STEPS  # twice as many, because batches of documents differ in size


def _num_evaluated(size: Size) -> int:
    return size.of(NUM_EVALUATED, 20)


def _num_targets(examples: Sequence[dict[str, list[int]]]) -> int:
    return sum(len(example["input_ids"]) - 1 for example in examples)


def _write(file: Path, documents: Sequence[str]) -> Path:
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return file


def _created(folder: Path) -> Path:
    folder.mkdir()
    return folder
