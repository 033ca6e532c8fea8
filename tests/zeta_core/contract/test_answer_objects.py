"""The chunks and whole objects that are built from the pieces of an answer."""

from zeta_core.contract.openai.answer_objects import AnswerObject
from zeta_core.contract.openai.answer_parameters import chat_query
from zeta_core.contract.wire.answers import Piece, TokenLogprob


def test_a_token_without_text_of_its_own_keeps_its_log_probability_in_a_stream() -> None:
    query = chat_query(
        {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "logprobs": True}
    )
    built = AnswerObject(query, "fingerprint")
    half = TokenLogprob(token="bytes:\\xc3", bytes=[0xC3], logprob=-0.5)
    pieces = [Piece(choice=0, text="", logprobs=[half], num_tokens=1), Piece(choice=0, text="é", num_tokens=2)]
    choices = []
    for piece in pieces:
        built.add(piece)
        choices += [chunk["choices"][0] for chunk in built.chunks(piece)]
    logprobs = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [entry["bytes"] for entry in logprobs] == [[0xC3]]
    assert choices[0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
