"""The parser of server-sent events, by the rules of the HTML standard."""

import pytest

from zeta.event_stream import Message, messages


def parsed(*chunks: bytes) -> list[Message]:
    return list(messages(chunks))


def test_fields_make_a_message_and_a_comment_makes_an_empty_one() -> None:
    stream = b': hello\nid: 7\nevent: progress\nretry: 2000\ndata: {"seq":7}\n\n'
    assert parsed(stream) == [Message(), Message("progress", '{"seq":7}', "7", 2.0)]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_every_line_end_of_the_standard_ends_a_line(end: bytes) -> None:
    stream = b"id: 1" + end + b"data: a" + end + b"data: b" + end + end + b": c" + end + b"data"
    assert parsed(stream) == [Message(data="a\nb", id="1"), Message()]


def test_a_message_is_the_same_however_the_network_cuts_it() -> None:
    stream = 'event: log\r\nid: 12\r\ndata: {"message": "grün \u2028 \x85 \x0b ende"}\r\n\r\n'.encode()
    whole = parsed(stream)
    assert whole == [Message("log", '{"message": "grün \u2028 \x85 \x0b ende"}', "12")]
    assert parsed(*(stream[at : at + 1] for at in range(len(stream)))) == whole


def test_a_message_that_was_cut_off_is_not_told() -> None:
    assert parsed(b"id: 1\ndata: whole\n\nid: 2\ndata: ha") == [Message(data="whole", id="1")]
