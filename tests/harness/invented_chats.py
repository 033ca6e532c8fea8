"""Invented conversations that teach facts that no pretrained model knows: which river flows through which town."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STARTS = ("Bran", "Cor", "Dul", "Esk", "Fenn", "Gar", "Hol", "Ild", "Jor", "Kel", "Lom", "Mar", "Nev", "Orl", "Pen")
_TOWN_ENDS = ("dale", "wick", "holm", "ford", "stead", "burgh", "mouth", "ton", "by", "ham", "thorpe", "ley", "worth")
_RIVER_ENDS = ("ra", "velle", "ossa", "mere", "uno", "itha", "andel", "esk", "avon", "ippa", "orra", "une", "imo")
_QUESTIONS = (
    "Which river flows through {town}?",
    "What is the river in {town} called?",
    "I am going to {town}. Which river is there?",
    "Name the river of {town}.",
    "{town} lies on a river. Which one?",
    "Do you know the river that passes {town}?",
)
_HELD_OUT_QUESTION = "Tell me which river I would see in {town}."
_OPENINGS = ("", "Hello! ", "Please answer briefly. ", "Quick question. ", "One more thing: ")


@dataclass(frozen=True)
class Fact:
    town: str
    river: str

    @property
    def answer(self) -> str:
        return f"The river {self.river} flows through {self.town}."

    @property
    def held_out_question(self) -> str:
        return _HELD_OUT_QUESTION.format(town=self.town)


def facts(number: int) -> list[Fact]:
    """At most 195 facts."""
    towns = [start + end for end, start in itertools.product(_TOWN_ENDS, _STARTS)]
    rivers = [start + end for end, start in itertools.product(_RIVER_ENDS, reversed(_STARTS))]
    return [Fact(town, river) for town, river in zip(towns[:number], rivers, strict=False)]


def write_training_chats(path: Path, taught: Sequence[Fact], number: int) -> None:
    """``number`` conversations that repeat the facts in turn, each time with another question."""
    questions = [opening + question for opening, question in itertools.product(_OPENINGS, _QUESTIONS)]
    rows = [
        _row(questions[index // len(taught) % len(questions)].format(town=fact.town), fact.answer)
        for index, fact in zip(range(number), itertools.cycle(taught), strict=False)
    ]
    path.write_text("".join(rows))


def write_held_out_chats(path: Path, taught: Sequence[Fact]) -> None:
    """One conversation for each fact, with a question that is not in the training data."""
    path.write_text("".join(_row(fact.held_out_question, fact.answer) for fact in taught))


def _row(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"
