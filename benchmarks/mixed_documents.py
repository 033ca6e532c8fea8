"""Real documents of mixed length: trained tokens per second, packed here and padded in `transformers.Trainer`.

The documents are the paragraphs of the Python language reference, which every CPython contains. Each byte is a token;
half of the documents are shorter than 112 tokens, and one in twenty is longer than 510. Documents that are longer than
a sequence are split, so both loops train on the whole text. The other library's batches are its default: drawn at
random, and padded to the longest document of each batch.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks import loops, workload
from benchmarks.contestants import run_in_turns
from benchmarks.result import ZETA, BenchmarkResult, ratio_of_rounds
from benchmarks.stopwatch import Stopwatch
from benchmarks.workload import WARM_UP_STEPS, Size

BATCH_SIZE, SEQ_LEN, VOCABULARY = 8, 512, 384
PADDED = "transformers.Trainer, padded"


def paragraphs() -> list[str]:
    parts = (part.strip() for topic in topics.values() for part in topic.split("\n\n"))
    return [part for part in parts if len(part.encode()) >= 2]


def packed(size: Size, folder: Path, documents: list[str], steps: int) -> float:
    from transformers import ByT5Tokenizer

    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    model, stopwatch = workload.llama(size, vocab_size=VOCABULARY), Stopwatch(skip=WARM_UP_STEPS)
    with stopwatch.running(model):
        outcome = workload.train_zeta(
            model,
            folder / "zeta",
            dataset=file,
            tokenizer=ByT5Tokenizer(),
            seq_len=size.of(SEQ_LEN, 64),
            batch_size=BATCH_SIZE,
            max_steps=steps,
        )
    trained = outcome.progress.num_targets / steps  # nearly the same in each step
    return trained * len(stopwatch.steps) / sum(step.wall for step in stopwatch.steps)


def padded(size: Size, folder: Path, documents: list[str], steps: int) -> float:
    from transformers import ByT5Tokenizer, DataCollatorForLanguageModeling, Trainer

    tokenizer = ByT5Tokenizer()
    ids = [[byte + 3 for byte in document.encode()] + [tokenizer.eos_token_id] for document in documents]
    max_length = size.of(SEQ_LEN, 64)
    rows: Any = [{"input_ids": row[at : at + max_length]} for row in ids for at in range(0, len(row), max_length)]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trained: list[int] = []

    def count_and_collate(examples: list[dict[str, Any]]) -> Any:
        trained.append(sum(len(example["input_ids"]) - 1 for example in examples))
        return collate(examples)

    model, stopwatch = workload.llama(size, vocab_size=VOCABULARY), Stopwatch(skip=WARM_UP_STEPS)
    arguments = workload.trainer_arguments(folder / "trainer", batch_size=BATCH_SIZE, steps=steps)
    with stopwatch.running(model):
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=count_and_collate).train()
    return sum(trained[WARM_UP_STEPS:steps]) / sum(step.wall for step in stopwatch.steps)


def measure(size: Size) -> BenchmarkResult:
    documents = paragraphs()
    speed: dict[str, list[float]] = {ZETA: [], PADDED: []}
    steps = 2 * size.steps + WARM_UP_STEPS  # batches with padding differ in size
    for _ in range(max(1, size.rounds - 1)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found = run_in_turns(
                size,
                {
                    ZETA: partial(packed, size, folder, documents, steps),
                    loops.TRAINER: partial(padded, size, folder, documents, steps),
                },
            )
        speed[ZETA].append(found[ZETA])
        speed[PADDED].append(found[loops.TRAINER])
    return BenchmarkResult(
        title="Real documents of mixed length, packed, relative to Trainer with padding",
        unit="trained tokens/s",
        figures=speed,
        ratio=ratio_of_rounds(speed[ZETA], speed[PADDED]),
        target=2.0,
        target_is="minimum",
        notes=f"{len(documents)} paragraphs, batch {BATCH_SIZE}, at most {SEQ_LEN} tokens.",
    )
