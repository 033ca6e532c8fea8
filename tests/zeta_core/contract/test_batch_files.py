"""Reading the input file of a batch: every fault is reported with its line."""

import io
import json
from typing import Any

import pytest

from zeta_core.contract.openai.batch_files import (
    MAX_FAULTS,
    MAX_LINE_BYTES,
    MAX_LINES,
    MAX_REQUESTS,
    InputFile,
    read_input,
)

BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}


def read(*lines: Any) -> InputFile:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return read_input(io.BytesIO(b"".join(line + b"\n" for line in encoded)), "/v1/chat/completions")


def test_valid_lines_become_requests_in_their_order() -> None:
    found = read(LINE, b"", {**LINE, "custom_id": "b", "body": {**BODY, "seed": 7}})
    assert found.faults == []
    assert [(request.row, request.custom_id) for request in found.requests] == [(0, "a"), (1, "b")]
    assert found.requests[1].query.options.seed == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"[]", "must be a JSON object"),
        ({**LINE, "method": "GET"}, "method is 'GET'"),
        ({**LINE, "custom_id": ""}, "custom_id"),
        ({**LINE, "custom_id": "first"}, "custom_id is 'first', as in line 1; use each once"),
        ({**LINE, "url": "/v1/completions"}, "url is '/v1/completions', but the endpoint of the batch is"),
        ({**LINE, "extra": 1}, "extra"),
        ({**LINE, "body": {**BODY, "stream": True}}, "a batch writes whole answers"),
        ({**LINE, "body": {**BODY, "model": "other"}}, "but the first request names 'm'; use one model per file"),
        ({**LINE, "body": {**BODY, "temperature": 3}}, "temperature is 3"),
        ({**LINE, "body": {**BODY, "reasoning_effort": "low"}}, "reasoning_effort"),
    ],
)
def test_a_faulty_line_is_reported_with_its_number(line: Any, message: str) -> None:
    found = read({**LINE, "custom_id": "first"}, line)
    assert len(found.requests) == 1
    [fault] = found.faults
    assert fault.message.startswith("Line 2: ")
    assert message in fault.message


def test_every_faulty_line_is_reported() -> None:
    found = read(b"{", LINE, {**LINE, "method": "GET", "custom_id": "b"})
    assert [fault.message.partition(":")[0] for fault in found.faults] == ["Line 1", "Line 3"]


@pytest.mark.extended
def test_a_file_without_requests_or_with_too_many_is_rejected() -> None:
    assert [fault.code for fault in read(b"", b" ").faults] == ["empty_file"]
    lines = [json.dumps({**LINE, "custom_id": str(number)}).encode() for number in range(MAX_REQUESTS + 1)]
    assert read(*lines[:-1], b"").num_requests == MAX_REQUESTS
    assert [fault.code for fault in read(*lines).faults] == ["too_many_requests"]


def test_reading_ends_at_the_limits_of_lines_and_faults() -> None:
    assert [fault.code for fault in read(*[b""] * (MAX_LINES + 1)).faults] == ["too_many_lines"]
    faults = read(*[b"{"] * (2 * MAX_FAULTS)).faults
    assert faults[0].message == "The lines from 1,001 on were not checked, because the file has 1,000 faults."
    assert len(faults) == MAX_FAULTS + 1


def test_a_long_line_is_not_parsed_and_the_next_one_is_read() -> None:
    """Parsing JSON blocks all other requests of a server, and `[],[],` takes 30 times its size as objects."""
    message = {"role": "user", "content": ""}
    at_limit = {**LINE, "custom_id": "b", "body": {**BODY, "messages": [message]}}
    message["content"] = "x" * (MAX_LINE_BYTES - len(json.dumps(at_limit)) - 1)
    found = read(LINE, b'{"body": {"a": [' + b"[]," * (2 * MAX_LINE_BYTES), {**LINE, "method": "GET"}, at_limit)
    assert [fault.message.partition(":")[0] for fault in found.faults] == ["Line 2", "Line 3"]
    assert found.faults[0].code == "line_too_long"
    assert found.num_requests == 4
