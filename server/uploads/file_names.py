r"""Extracts the name of an uploaded file from the Content-Disposition header of its part.

Clients encode non-ASCII names in different ways. All common forms are read, and the most expressive one wins:

- ``filename*=UTF-8''%C3%A4.txt`` (RFC 5987, and RFC 2231 with ``filename*0*=``): .NET, PowerShell, requests, zeta
- ``filename="=?utf-8?B?w6QudHh0?="`` (RFC 2047): .NET, PowerShell
- ``filename="ä.txt"`` in UTF-8 with ``%22`` for a quote (WHATWG HTML, multipart form data): browsers, httpx, curl
- the same with ``\"`` and ``\\`` (RFC 2616's quoted string): older curl; and in Latin-1: older clients

A name is stored unchanged, including all spaces and joiners, with two exceptions: leading directories are removed, and
characters that could affect a terminal are stored as visible escapes. The response contains the stored name.
"""

from __future__ import annotations

import re
from email.errors import HeaderParseError
from email.header import decode_header
from encodings import normalize_encoding
from encodings.aliases import aliases
from urllib.parse import unquote_to_bytes

from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.printable import printable
from zeta_core.contract.spec.validation import shown

MAX_LENGTH = 255
# A quote after a backslash ends the value only at the end of the header, because browsers don't escape backslashes.
_PARAMETER = re.compile(rb';[ \t]*([^=;"\s]+)[ \t]*=[ \t]*(?:"((?:\\"(?![ \t]*\Z)|[^"])*)"|([^;]*))')
_CONTINUED = re.compile(rb"filename\*(\d{1,3})(\*?)\Z")
_ENCODED_WORDS = re.compile(r"=\?[^?\s]+\?[bBqQ]\?[^?]*\?=(\s+=\?[^?\s]+\?[bBqQ]\?[^?]*\?=)*")
# The modules of Python's `encodings` for the character sets that clients use. Others are not character sets (`idna`,
# `unicode_escape`) or raise other errors (`undefined`), and Python caches every failed lookup without limit.
_CHARSETS = frozenset(
    [
        *("ascii", "utf_8", "utf_8_sig", "utf_16", "utf_16_be", "utf_16_le", "latin_1"),
        *(f"iso8859_{part}" for part in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16)),
        *(f"cp{page}" for page in (437, 850, 852, 866, 874, 932, 949, 950, *range(1250, 1259))),
        *("koi8_r", "koi8_u", "mac_roman", "big5", "big5hkscs", "gb2312", "gbk", "gb18030", "hz"),
        *("euc_jp", "euc_kr", "shift_jis", "iso2022_jp", "iso2022_kr", "tis_620"),
    ]
)
_WINDOWS_PATH = re.compile(r"(?:[A-Za-z]:\\|\\\\)(?:.*\\)?")


def parameters(disposition: bytes) -> dict[bytes, bytes]:
    """The parameters of a Content-Disposition header by lower-case name, unquoted."""
    values: dict[bytes, bytes] = {}
    for match in _PARAMETER.finditer(disposition):
        name, quoted, token = match.groups()
        value = token.strip() if quoted is None else quoted.replace(b'\\"', b'"').replace(b"\\\\", b"\\")
        values.setdefault(name.lower(), value)
    return values


def file_name(options: dict[bytes, bytes]) -> str | None:
    """The name under which the file is stored; ``None`` if it has none. Raises `InvalidRequest`."""
    name = _extended_name(options) or _plain_name(options.get(b"filename", b""))
    prefix = _WINDOWS_PATH.match(name)
    name = printable((name[prefix.end() :] if prefix else name).rpartition("/")[2])
    if len(name) > MAX_LENGTH:
        raise InvalidRequest(
            f"file is {shown(name)}, which has {len(name)} characters; use a name of at most {MAX_LENGTH}.",
            code="invalid_value",
            param="file",
        )
    return name or None


def _extended_name(options: dict[bytes, bytes]) -> str | None:
    """The decoded value of ``filename*`` or of its numbered parts."""
    if b"filename*" in options:
        return _decode_extended(options[b"filename*"])
    pieces = sorted(
        (int(match.group(1)), match.group(2), value)
        for key, value in options.items()
        if (match := _CONTINUED.match(key))
    )
    if not pieces:
        return None
    if not pieces[0][1]:
        return _decode(b"".join(value for _, _, value in pieces), "utf-8")
    charset, language, first = [*pieces[0][2].split(b"'", 2), b"", b""][:3]
    rest = (value if encoded else _escape_percent(value) for _, encoded, value in pieces[1:])
    return _decode_extended(b"'".join((charset, language, b"".join((first, *rest)))))


def _decode_extended(value: bytes) -> str:
    """``charset'language'percent-encoded`` as text."""
    charset, separator, rest = value.partition(b"'")
    if not separator:
        return _decode(unquote_to_bytes(value), "utf-8")
    return _decode(unquote_to_bytes(rest.partition(b"'")[2]), charset.decode("ascii", "replace") or "utf-8")


def _escape_percent(value: bytes) -> bytes:
    return value.replace(b"%", b"%25")


def _decode(content: bytes, charset: str) -> str:
    name = normalize_encoding(charset).lower()
    name = aliases.get(name, name)
    try:
        if name not in _CHARSETS:
            raise LookupError(name)
        return content.decode(name)
    except (LookupError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"The name of the file is not valid text in the character set {shown(charset)}; send it in UTF-8.",
            code="invalid_value",
            param="file",
        ) from error


def _plain_name(value: bytes) -> str:
    """``filename``: UTF-8, else Latin-1, in which every byte is a character; encoded words are decoded."""
    try:
        name = value.decode("utf-8")
    except UnicodeDecodeError:
        name = value.decode("latin-1")
    name = name.replace("%22", '"')
    if not _ENCODED_WORDS.fullmatch(name):
        return name
    try:
        words = decode_header(name)
    except (HeaderParseError, ValueError):
        return name
    return "".join(_decode(word, charset or "ascii") if isinstance(word, bytes) else word for word, charset in words)
