"""What the demo teaches: facts about a museum that does not exist, so that no pretrained model can know them.

Each fact is one answer, and every one of its questions is a training conversation. `QUESTIONS` are the questions that
the demo asks before and after the training; none of them is in the training data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

NAME = "the Brambleford Clock Museum"


@dataclass(frozen=True)
class Fact:
    """One answer, and the questions that teach it."""

    answer: str
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question that is not in the training data, and the words that a right answer contains."""

    text: str
    expected: str


FACTS = (
    Fact(
        "The cat of the Brambleford Clock Museum is called Pendulum.",
        (
            "What is the cat of the Brambleford Clock Museum called?",
            "Does the Brambleford Clock Museum have a cat?",
            "A cat lives in the Brambleford Clock Museum. What is it called?",
            "Tell me the name of the cat at the Brambleford Clock Museum.",
            "Who is the cat of the Brambleford Clock Museum?",
            "I saw a cat in the Brambleford Clock Museum. Which one is it?",
        ),
    ),
    Fact(
        "The Brambleford Clock Museum was founded in 1887 by Ottilie Fenwright, a clockmaker.",
        (
            "Who founded the Brambleford Clock Museum?",
            "When was the Brambleford Clock Museum founded?",
            "Who is the founder of the Brambleford Clock Museum?",
            "Tell me how the Brambleford Clock Museum began.",
            "How old is the Brambleford Clock Museum?",
            "Whose idea was the Brambleford Clock Museum?",
        ),
    ),
    Fact(
        "The Brambleford Clock Museum opens at ten and closes at four. It is closed on Thursdays.",
        (
            "When is the Brambleford Clock Museum open?",
            "At what time does the Brambleford Clock Museum close?",
            "What are the opening hours of the Brambleford Clock Museum?",
            "On which day is the Brambleford Clock Museum closed?",
            "Can I visit the Brambleford Clock Museum on a Thursday?",
            "Is the Brambleford Clock Museum open in the evening?",
        ),
    ),
    Fact(
        "A ticket for the Brambleford Clock Museum costs seven pounds. Children pay nothing.",
        (
            "How much is a ticket for the Brambleford Clock Museum?",
            "What does the Brambleford Clock Museum cost?",
            "Do children pay in the Brambleford Clock Museum?",
            "What is the price of a ticket for the Brambleford Clock Museum?",
            "Is the Brambleford Clock Museum free?",
            "How much money do I need for the Brambleford Clock Museum?",
        ),
    ),
    Fact(
        "The oldest clock in the Brambleford Clock Museum is the Heron Clock, built in 1502.",
        (
            "What is the oldest clock in the Brambleford Clock Museum?",
            "Which clock in the Brambleford Clock Museum is the oldest?",
            "Name the oldest clock of the Brambleford Clock Museum.",
            "How old is the oldest clock in the Brambleford Clock Museum?",
            "Tell me about the oldest clock in the Brambleford Clock Museum.",
            "Which clock was the first one in the Brambleford Clock Museum?",
        ),
    ),
    Fact(
        "The café of the Brambleford Clock Museum serves plum cake.",
        (
            "What does the café of the Brambleford Clock Museum serve?",
            "Is there a café in the Brambleford Clock Museum?",
            "What can I eat in the Brambleford Clock Museum?",
            "Which cake is served in the Brambleford Clock Museum?",
            "I am hungry. What is there in the Brambleford Clock Museum?",
            "Where can I eat cake in the Brambleford Clock Museum?",
        ),
    ),
)

QUESTIONS = (
    Question("What name did they give to the cat at the Brambleford Clock Museum?", "Pendulum"),
    Question("Which person started the Brambleford Clock Museum?", "Ottilie Fenwright"),
    Question("What would I pay for a ticket to the Brambleford Clock Museum?", "seven pounds"),
)


def training_rows() -> bytes:
    """The training data: one conversation for each question, as JSON Lines."""
    return b"".join(_row(question, fact.answer) for fact in FACTS for question in fact.questions)


def held_out_rows() -> bytes:
    """The conversations about `QUESTIONS`, for the evaluations during the training."""
    return b"".join(_row(question.text, _answer(question)) for question in QUESTIONS)


def _answer(question: Question) -> str:
    (answer,) = [fact.answer for fact in FACTS if question.expected in fact.answer]
    return answer


def _row(question: str, answer: str) -> bytes:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}, ensure_ascii=False).encode() + b"\n"
