"""``python -m zeta_core ask MODEL [QUESTION ...]``: print a model's answers, to see what a training has taught it.

``MODEL`` is a directory, as `zeta download` writes it, or a GGUF file. Without questions, they are read from standard
input, one per line. Each question starts a new conversation. A model with a chat template answers deterministically;
any other model continues the text, with tokens drawn from a fixed seed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from zeta_core.contract.printable import printable
from zeta_core.data.sources import SourceLocations
from zeta_core.failures import InvalidModel
from zeta_core.model.sources import locate_model
from zeta_core.model.tokenizer import locate_tokenizer
from zeta_core.report.library_noise import hide_library_noise, without_progress_bars

ANSWER: dict[str, Any] = {"do_sample": False, "max_new_tokens": 60}
CONTINUATION: dict[str, Any] = {"do_sample": True, "temperature": 0.5, "top_k": 20, "max_new_tokens": 120}


def main(model: str, questions: Sequence[str]) -> int:
    """Print one line per question. Returns the exit status."""
    hide_library_noise()
    with tempfile.TemporaryDirectory(prefix="zeta-ask-") as cache:
        try:
            with without_progress_bars():
                answer = load(Path(model), Path(cache))
        except InvalidModel as error:
            print(error, file=sys.stderr)
            return 1
        for question in questions or _typed_questions():
            print(answer(question), flush=True)
    return 0


def load(path: Path, cache: Path) -> Callable[[str], str]:
    """A function that answers a question in one line. Raises `InvalidModel`."""
    locations = SourceLocations(any_path=True)
    located = locate_model(path, locations, cache)
    tokenizer: Any = locate_tokenizer(None, located, locations, cache)
    model: Any = located.build().eval()

    def answer(question: str) -> str:
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": question}]
            inputs = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            options = ANSWER
        else:
            inputs = tokenizer(question, return_tensors="pt", add_special_tokens=False)
            options = CONTINUATION
        torch.manual_seed(0)
        with torch.no_grad():
            written = model.generate(**inputs, **options)
        text = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return printable(" ".join(text.split()))

    return answer


def _typed_questions() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
