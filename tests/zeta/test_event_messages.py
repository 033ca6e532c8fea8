"""Parsing server-sent events by the rules of the HTML standard, however the network splits the stream."""

import pytest

from zeta.event_stream import parse_messages


def parsed(*chunks: bytes) -> list[tuple[str, str, str, int | None]]:
    return [(message.event, message.data, message.id, message.retry) for message in parse_messages(chunks)]


def test_a_message_has_the_fields_of_its_lines_and_a_comment_is_ignored() -> None:
    stream = b': hello\nid: 7\nevent: progress\nretry: 2000\ndata: {"seq":7}\n\n'
    assert parsed(stream) == [("progress", '{"seq":7}', "7", 2000)]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_every_line_end_of_the_standard_ends_a_line(end: bytes) -> None:
    stream = b"id: 1" + end + b"data: a" + end + b"data: b" + end + end + b": c" + end + b"data"
    assert parsed(stream) == [("message", "a\nb", "1", None)]


def test_a_message_is_the_same_however_the_network_splits_it() -> None:
    stream = 'event: log\r\nid: 12\r\ndata: {"message": "grün \u2028 \x85 \x0b ende"}\r\n\r\n'.encode()
    whole = parsed(stream)
    assert whole == [("log", '{"message": "grün \u2028 \x85 \x0b ende"}', "12", None)]
    assert parsed(*(stream[at : at + 1] for at in range(len(stream)))) == whole


@pytest.mark.parametrize("end", [b"", b"\n", b"\r"])
def test_a_message_that_was_cut_off_is_ignored(end: bytes) -> None:
    assert parsed(b"id: 1\ndata: whole\n\nid: 2\ndata: ha" + end) == [("message", "whole", "1", None)]
