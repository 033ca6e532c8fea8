"""Parts of answers: numbered, repeated until they are acknowledged, and never far ahead of the client."""

from dataclasses import dataclass, field

from pydantic import BaseModel

from tests.harness.waiting import wait_until
from worker.serving.outbox import Outboxes
from zeta_core.contract.wire.answers import (
    MAX_AHEAD,
    AnswerControl,
    AnswerOptions,
    AnswerPart,
    AnswerRequest,
    Failure,
    Generated,
    Piece,
    Prompt,
    ServedWeights,
    answer_stream,
)

WEIGHTS = ServedWeights(name="job_a/final", project="default", model={"job": "job_a"}, fingerprint="f" * 64)
REQUEST = AnswerRequest(
    request_id="req_1", server="s1", weights=WEIGHTS, prompt=Prompt(text="Hi"), options=AnswerOptions()
)


@dataclass
class Sent:
    parts: list[AnswerPart] = field(default_factory=list[AnswerPart])

    def post(self, key: tuple[object, ...], message: BaseModel, stream: str) -> None:
        assert isinstance(message, AnswerPart)
        assert stream == answer_stream("s1")
        assert key == ("answer", "req_1", message.number)
        self.parts.append(message)

    @property
    def text(self) -> str:
        by_number = {part.number: part for part in self.parts if part.number}
        assert list(by_number) == list(range(1, len(by_number) + 1))
        return "".join(piece.text for part in by_number.values() for piece in part.pieces)


def piece(text: str, **fields: object) -> Generated:
    return Generated(request_id="req_1", pieces=[Piece(choice=0, text=text, num_tokens=1)], **fields)  # pyright: ignore[reportArgumentType]


def control(received: int, consumed: int, *, cancel: bool = False) -> AnswerControl:
    return AnswerControl(request_id="req_1", received=received, consumed=consumed, cancel=cancel)


def test_a_request_is_answered_with_a_sign_of_life_and_taken_only_once() -> None:
    sent = Sent()
    outboxes = Outboxes(sent.post)
    assert outboxes.open(REQUEST)
    assert [part.number for part in sent.parts] == [0]
    assert not outboxes.open(REQUEST)


def test_a_worker_is_never_further_ahead_than_the_limit_and_loses_nothing() -> None:
    sent = Sent()
    outboxes = Outboxes(sent.post)
    outboxes.open(REQUEST)
    for number in range(100):
        outboxes.add(piece(f"{number} "))
    assert max(part.number for part in sent.parts) == MAX_AHEAD
    outboxes.acknowledge(control(MAX_AHEAD, 0))  # received, but the client has taken nothing
    assert max(part.number for part in sent.parts) == MAX_AHEAD
    outboxes.acknowledge(control(MAX_AHEAD, 1))
    outboxes.add(piece("end", is_last=True))
    outboxes.acknowledge(control(MAX_AHEAD + 1, MAX_AHEAD + 1))
    assert sent.text == "".join(f"{number} " for number in range(100)) + "end"
    assert sent.parts[-1].is_last
    outboxes.acknowledge(control(MAX_AHEAD + 2, MAX_AHEAD + 2))
    assert len(outboxes) == 0


def test_a_part_is_repeated_until_it_is_acknowledged() -> None:
    sent = Sent()
    outboxes = Outboxes(sent.post)
    outboxes.open(REQUEST)
    outboxes.add(piece("a"))

    def repeated() -> bool:
        outboxes.step()
        return [part.number for part in sent.parts].count(1) == 2

    wait_until(repeated, 5, "the part to be repeated")
    outboxes.acknowledge(control(1, 1))
    assert sent.text == "a"


def test_a_failure_ends_an_answer_once() -> None:
    sent = Sent()
    outboxes = Outboxes(sent.post)
    outboxes.open(REQUEST)
    outboxes.fail(["req_1"], Failure(code="evicted", message="A job needs the device."))
    outboxes.add(piece("too late"))
    assert [part.failure.code for part in sent.parts if part.failure is not None] == ["evicted"]
    assert sent.parts[-1].is_last


def test_a_request_of_a_silent_server_is_given_up() -> None:
    outboxes = Outboxes(Sent().post)
    outboxes.open(REQUEST)
    assert outboxes.step(silence_seconds=60) == []
    assert outboxes.step(silence_seconds=-1) == ["req_1"]
    assert len(outboxes) == 0


def test_a_cancelled_request_sends_nothing_more() -> None:
    sent = Sent()
    outboxes = Outboxes(sent.post)
    outboxes.open(REQUEST)
    outboxes.acknowledge(control(0, 0, cancel=True))
    outboxes.add(piece("a"))
    assert [part.number for part in sent.parts] == [0]
