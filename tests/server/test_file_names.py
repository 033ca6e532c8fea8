"""The file name that a client sends is the one that is stored, for all common clients."""

from urllib.parse import quote

import httpx
import pytest

from tests.server.server_process import ServerProcess, error_of

HEADERS = {"Content-Type": "multipart/form-data; boundary=b"}


def upload(http: httpx.Client, parameters: bytes, name: bytes = b'name="file"') -> httpx.Response:
    """A file whose part has these parameters beside its name."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\ndataset\r\n'
        b"--b\r\nContent-Disposition: form-data; " + name + b"; " + parameters + b"\r\n\r\ntext\n\r\n--b--\r\n"
    )
    return http.post("/v1/files", content=body, headers=HEADERS)


@pytest.mark.parametrize(
    ("parameters", "stored"),
    [
        (rb'filename="a b.txt"', "a b.txt"),
        (rb"filename=plain.txt", "plain.txt"),
        ('filename="日本\u3000語.txt"'.encode(), "日本\u3000語.txt"),
        ('filename="no\u00a0break\u2009thin.txt"'.encode(), "no\u00a0break\u2009thin.txt"),
        ('filename="👩\u200d🔬 ❤\ufe0f.txt"'.encode(), "👩\u200d🔬 ❤\ufe0f.txt"),
        ('filename="e\u0301 شلوم.txt"'.encode(), "e\u0301 شلوم.txt"),
        (b'filename="caf\xe9 na\xefve.txt"', "café naïve.txt"),
        (rb'filename="say %22hi%22 100%.txt"', 'say "hi" 100%.txt'),
        (rb'filename="say \"hi\".txt"', 'say "hi".txt'),
        (rb'filename="semi;colon; name=x.txt"', "semi;colon; name=x.txt"),
        (rb'filename="back\slash.txt"', r"back\slash.txt"),
        (rb'filename="back\\slash.txt"', r"back\slash.txt"),
        (rb'filename="C:\Users\me\a.txt"', "a.txt"),
        (rb'filename="\\\\server\\share\\a.txt"', "a.txt"),
        (rb'filename="../../etc/a.txt"', "a.txt"),
        (rb'filename="=?utf-8?B?w7xiZXIudHh0?="', "über.txt"),
        (rb'filename="=?iso-8859-1?Q?=FCber=20uns.txt?="', "über uns.txt"),
        (rb'filename="=?utf-8?B?w7w=?= =?utf-8?B?YmVyLnR4dA==?="', "über.txt"),
        (rb'filename="=?utf-8?B?w7xiZXIudHh0?="; filename*=utf-8' + b"''%C3%BCber.txt", "über.txt"),
        (rb"filename*=UTF-8''%e2%82%ac%20rates.txt", "€ rates.txt"),
        (rb"filename*=iso-8859-1'en'%A3%20rates.txt", "£ rates.txt"),
        (rb"filename*=Windows-1251''%EF%F0%E8%EC%E5%F0.txt", "пример.txt"),
        (rb'filename="=?Shift_JIS?B?k/qWey50eHQ=?="', "日本.txt"),
        (rb"""filename*="UTF-8''a%22b.txt"; filename="a_b.txt" """, 'a"b.txt'),
        (rb"filename*0*=UTF-8''%C3%BCber; filename*1=-100%.txt", "über-100%.txt"),
        (rb'filename*0="one"; filename*1="-two.txt"', "one-two.txt"),
        (b'FileName="upper.txt"', "upper.txt"),
    ],
)
def test_file_names_of_all_clients_are_decoded(http: httpx.Client, parameters: bytes, stored: str) -> None:
    response = upload(http, parameters)
    assert response.status_code == 201, response.text
    file = response.json()
    assert file["filename"] == stored
    assert http.get(f"/v1/files/{file['id']}").json()["filename"] == stored
    content = http.get(f"/v1/files/{file['id']}/content")
    assert content.headers["content-disposition"] == f"attachment; filename*=UTF-8''{quote(stored, safe='')}"


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("\x1b[2Jclear.txt", r"\x1b[2Jclear.txt"),
        ("\u009b31mred.txt", r"\x9b31mred.txt"),
        ("exe.\u202etxt.txt", r"exe.\u202etxt.txt"),
        ("two\nlines.txt", r"two\x0alines.txt"),
        ("nul\0.txt", r"nul\x00.txt"),
    ],
)
def test_terminal_control_characters_are_stored_escaped(http: httpx.Client, name: str, stored: str) -> None:
    response = upload(http, b"filename*=UTF-8''" + quote(name, safe="").encode())
    assert (response.status_code, response.json()["filename"]) == (201, stored)


@pytest.mark.parametrize(
    "parameters",
    [
        b'filename=""',
        b"filename*=UTF-8''",
        b"filename*=klingon''a.txt",
        b"filename*=UTF-8''%FF.txt",
        b"filename*=idna''xn--a.txt",
        b"filename*=punycode''abc-999999999999.txt",
        b"filename*=undefined''a.txt",
        b"filename*=unicode_escape''%5Cx41.txt",
        b"filename*=%00''a.txt",
        b'filename="=?idna?B?eG4tLWE=?="',
        b'filename="=?klingon?B?w7w=?="',
        b'filename="' + b"a" * 300 + b'.txt"',
        b'filename="a/"',
    ],
)
def test_an_invalid_name_is_rejected(http: httpx.Client, parameters: bytes) -> None:
    response = upload(http, parameters)
    assert (response.status_code, error_of(response)["param"]) == (422, "file")


def test_a_long_header_of_quotes_is_parsed_quickly(server: ServerProcess, http: httpx.Client) -> None:
    for junk in (rb"\"", b"; a", b'; a="', b";", b"=?", b"=?a?b?", b"\\\\"):
        for num_bytes, status in ((3_000, 422), (40_000, 400)):
            response = upload(http, b'filename="' + junk * (num_bytes // len(junk)))
            assert response.status_code == status
            assert response.elapsed.total_seconds() < 5


@pytest.mark.parametrize(("encoding", "status"), [("base64", 422), ("Quoted-Printable", 422), ("BINARY", 201)])
def test_an_encoded_part_is_rejected(http: httpx.Client, encoding: str, status: int) -> None:
    response = upload(http, b'filename="a.txt"\r\nContent-Transfer-Encoding: ' + encoding.encode())
    assert response.status_code == status
    if status == 422:
        error = error_of(response)
        assert (error["param"], encoding in error["message"]) == ("Content-Transfer-Encoding", True)
