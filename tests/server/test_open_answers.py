"""Parts of an answer that arrive at the server."""

import asyncio

from pydantic import BaseModel

from server.engine.answers import OpenAnswer
from zeta_core.contract.wire.answers import (
    MAX_AHEAD,
    AnswerControl,
    AnswerOptions,
    AnswerPart,
    AnswerRequest,
    Prompt,
    ServedWeights,
)


def test_a_worker_cannot_send_more_parts_than_a_slow_client_may_leave_waiting() -> None:
    """Parts beyond the limit are neither stored nor acknowledged, so a worker that is too fast repeats them."""
    sent: list[AnswerControl] = []

    async def send(worker: str, message: BaseModel) -> None:
        assert isinstance(message, AnswerControl)
        sent.append(message)

    async def flood() -> list[int]:
        weights = ServedWeights(name="m", project="p", model="org/m", fingerprint="f")
        request = AnswerRequest(
            request_id="r", server="s", weights=weights, prompt=Prompt(text="a"), options=AnswerOptions(max_tokens=1)
        )
        answer = OpenAnswer(request, "w", send)
        for number in range(1, 10 * MAX_AHEAD):
            await answer.receive(AnswerPart(request_id="r", number=number))
        taken = [part.number for _ in range(MAX_AHEAD) if (part := await answer.next_part(1)) is not None]
        assert await answer.next_part(0.01) is None, "nothing more was stored"
        await answer.receive(AnswerPart(request_id="r", number=MAX_AHEAD + 1, is_last=True))
        last = await answer.next_part(1)
        assert last is not None
        return [*taken, last.number]

    assert asyncio.run(flood()) == list(range(1, MAX_AHEAD + 2))
    assert max(message.received for message in sent[: 10 * MAX_AHEAD - 1]) == MAX_AHEAD
