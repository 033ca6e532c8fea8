"""Real documents of mixed length: tokens learned in a second, packed by us and padded by `transformers.Trainer`.

The documents are the paragraphs of the Python language reference that every CPython has (bytes as tokens: half of them
shorter than 112, one in twenty longer than 510). Those of more than a sequence are cut, so both learn all of the text.
The peer's batches are made as its default makes them: drawn at random, padded to the longest of each.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks import loops, work
from benchmarks.answer import OURS, Answer, ratio_of_rounds
from benchmarks.contestants import side_by_side
from benchmarks.stopwatch import Stopwatch
from benchmarks.work import WARM_UP_STEPS, Size

BATCH_SIZE, SEQ_LEN, VOCABULARY = 8, 512, 384
PADDED = "transformers.Trainer, padded"


def paragraphs() -> list[str]:
    parts = (part.strip() for topic in topics.values() for part in topic.split("\n\n"))
    return [part for part in parts if len(part.encode()) >= 2]


def packed(size: Size, folder: Path, documents: list[str], steps: int) -> float:
    from transformers import ByT5Tokenizer

    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    model, stopwatch = work.llama(size, vocab_size=VOCABULARY), Stopwatch(skip=WARM_UP_STEPS)
    with stopwatch.running(model):
        outcome = work.train_ours(
            model,
            folder / "ours",
            dataset=file,
            tokenizer=ByT5Tokenizer(),
            seq_len=size.of(SEQ_LEN, 64),
            batch_size=BATCH_SIZE,
            max_steps=steps,
        )
    learned = outcome.progress.num_targets / steps  # nearly the same in each step
    return learned * len(stopwatch.steps) / sum(step.wall for step in stopwatch.steps)


def padded(size: Size, folder: Path, documents: list[str], steps: int) -> float:
    from transformers import ByT5Tokenizer, DataCollatorForLanguageModeling, Trainer

    tokenizer = ByT5Tokenizer()
    ids = [[byte + 3 for byte in document.encode()] + [tokenizer.eos_token_id] for document in documents]
    most = size.of(SEQ_LEN, 64)
    rows: Any = [{"input_ids": row[at : at + most]} for row in ids for at in range(0, len(row), most)]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    learned: list[int] = []

    def counted(examples: list[dict[str, Any]]) -> Any:
        learned.append(sum(len(example["input_ids"]) - 1 for example in examples))
        return collate(examples)

    model, stopwatch = work.llama(size, vocab_size=VOCABULARY), Stopwatch(skip=WARM_UP_STEPS)
    arguments = work.trainer_arguments(folder / "peer", batch_size=BATCH_SIZE, steps=steps)
    with stopwatch.running(model):
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=counted).train()
    return sum(learned[WARM_UP_STEPS:steps]) / sum(step.wall for step in stopwatch.steps)


def measure(size: Size) -> Answer:
    documents = paragraphs()
    speed: dict[str, list[float]] = {OURS: [], PADDED: []}
    steps = 2 * size.steps + WARM_UP_STEPS  # the peer's batches are uneven
    for _ in range(max(1, size.rounds - 1)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found = side_by_side(
                size,
                {
                    OURS: partial(packed, size, folder, documents, steps),
                    loops.TRAINER: partial(padded, size, folder, documents, steps),
                },
            )
        speed[OURS].append(found[OURS])
        speed[PADDED].append(found[loops.TRAINER])
    return Answer(
        question="Real documents of mixed length, ours packed by Trainer's padded",
        unit="learned tokens/s",
        figures=speed,
        ratio=ratio_of_rounds(speed[OURS], speed[PADDED]),
        bar=2.0,
        better="at least",
        notes=f"{len(documents)} paragraphs, batch {BATCH_SIZE}, at most {SEQ_LEN} tokens.",
    )
