"""Tables of hostile requests: paths, queries, headers, framing and JSON specs, each with a name for the report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from tests.harness.model_archives import CONFIG

CANARY = "canary-9f8e7d6c-of-the-operator"
CANARY_FILE = f"/tmp/zeta-hostile-canary-{os.getpid()}"  # contains it; nothing may open this file
SPEC: dict[str, Any] = {
    "model": {"config": CONFIG},
    "tokenizer": {"builtin": "bytes"},
    "dataset": {"builtin": "python-docs"},
    "max_steps": 1,
    "seq_len": 32,
    "batch_size": 1,
}

# --- Paths and queries: requested as they are ------------------------------------------------------------------------

_OUTSIDE = (
    *("../admin.key", "..%2fadmin.key", "%2e%2e/%2e%2e/admin.key", "..%5c..%5cadmin.key", "....//....//admin.key"),
    *(
        CANARY_FILE,
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "..%252f..%252fadmin.key",
        "%c0%ae%c0%ae/admin.key",
        "..;/admin.key",
    ),
    *(f"file://{CANARY_FILE}", "~/.zeta/admin.key", "%00", "a%00b", "%0d%0aX-Injected:%20yes", "C:%5cwindows", "."),
)
_PLACES = (
    "/{}",
    "/v1/jobs/{}",
    "/v1/files/{}",
    "/v1/files/{}/content",
    "/v1/jobs/{}/logs",
    "/v1/jobs/job_01m8ns37035n8d84tz16az9r/checkpoints/{}/files/{}",
)
PATHS = [place.format(*[part] * place.count("{}")) for place in _PLACES for part in _OUTSIDE] + [
    "/v1/jobs//../../admin.key",
    "//evil.example/v1/jobs",
    "/v1/jobs/" + "a" * 10_000,
    "/" + "a/" * 10_000,
    "/v1/jobs/%F0%9F%92%A9",
    "/v1/jobs/%ff%fe",
    "/v1/jobs/%u0041",
    "/v1/jobs/%",
    "/v1/jobs/job_' OR 1=1 --",
]
QUERIES = [
    f"/v1/{where}?{query}"
    for where in ("jobs", "files")
    for query in (
        *("limit=0", "limit=-1", "limit=1001", "limit=1e3", "limit=9" + "9" * 400, "limit=NaN", "limit=", "limit=%00"),
        *("after=", "after=..", "after=job_'%20OR%201=1", "after=%00", "after=" + "a" * 9_000, "after=1&after=2"),
        *("nonsense=1", "__proto__=1", "metadata[]=1", "metadata[a]['b']=1", "metadata[%00]=1", "status=unknown"),
        *("&".join(f"metadata[k{i}]=v" for i in range(1000)), "&" * 5_000, "=&=&=", "%=%", "a[b[c[d]]]=1"),
        *("sha256=%27", "sha256=" + "0" * 9_000, "entity_name=%F0%9F%92%A9", "entity_name=%ed%a0%80", "limit=%D9%A1"),
    )
]

# --- Headers and framing: raw bytes after the request line ------------------------------------------------------------

HEADERS: dict[str, str] = {
    "a key of another form": "Authorization: Basic YTpi",
    "an empty key": "Authorization: Bearer ",
    "a huge key": "Authorization: Bearer " + "a" * 30_000,
    "a key with bytes": "Authorization: Bearer \xff\xfe",
    "an SQL key": "Authorization: Bearer ' OR 1=1 --",
    "two keys": "Authorization: Bearer a\r\nAuthorization: Bearer b",
    "a foreign host": "Host: evil.example",
    "an injected request id": "X-Request-Id: a b<script>",
    "a huge request id": "X-Request-Id: " + "a" * 9_000,
    "a forwarded client": "X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Host: evil.example\r\nX-Forwarded-Prefix: //evil",
    "a forwarded element": 'Forwarded: for="[::1]";host="evil.example";proto=javascript',
    "another method": "X-HTTP-Method-Override: DELETE",
    "a rewritten path": "X-Original-URL: /v1/keys\r\nX-Rewrite-URL: /v1/keys",
    "a wide range": "Range: bytes=" + ",".join(["0-0"] * 1_000),
    "a negative range": "Range: bytes=-99999999999999999999",
    "a foreign range": "Range: lines=1-2",
    "an odd event id": "Accept: text/event-stream\r\nLast-Event-ID: 9" + "9" * 99,
    "a non-ASCII event id": "Accept: text/event-stream\r\nLast-Event-ID: \xb2",
    "an odd media type": "Accept: " + "*/*;q=0.1," * 2_000,
    "a huge cookie": "Cookie: " + "a=b; " * 5_000,
    "a compressed body": "Content-Encoding: gzip",
    "a control character": "X-A: a\x01b",
    "a folded header": "X-A: b\r\n c: d",
    "a space before the colon": "X-A : b",
    "no name": ": b",
    "300 headers": "\r\n".join(f"X-{i}: a" for i in range(300)),
    "a project that does not exist": "Zeta-Project: none",
    "a project with a path": "Zeta-Project: ../default",
    "a project with bytes": "Zeta-Project: \xff",
    "an upgrade": "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\nSec-WebSocket-Version: 13",
    "HTTP/2": "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
    "an expectation": "Expect: 200-maybe",
}
_AT = "POST /v1/jobs/validate HTTP/1.1\r\nHost: localhost\r\n{key}"
FRAMING: dict[str, bytes] = {
    name: (_AT + text).encode("latin-1")
    for name, text in {
        "both lengths": "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/keys HTTP/1.1\r\n\r\n",
        "two lengths": "Content-Length: 2\r\nContent-Length: 7\r\n\r\n{}",
        "a negative length": "Content-Length: -1\r\n\r\n{}",
        "a signed length": "Content-Length: +2\r\n\r\n{}",
        "a hexadecimal length": "Content-Length: 0x2\r\n\r\n{}",
        "a huge length": "Content-Length: 9" + "9" * 30 + "\r\n\r\n{}",
        "a large length": "Content-Length: 99999999999\r\n\r\n{}",
        "a list of lengths": "Content-Length: 2, 2\r\n\r\n{}",
        "a truncated body": "Content-Length: 100\r\n\r\n{",
        "two encodings": "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "an unknown encoding": "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "a repeated encoding": "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "a vertical tab": "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        "a negative chunk": "Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
        "a huge chunk": "Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}\r\n",
        "a chunk without an end": "Transfer-Encoding: chunked\r\n\r\n2\r\n{}X",
        "a long chunk extension": "Transfer-Encoding: chunked\r\n\r\n2;" + "a" * 200_000 + "\r\n{}\r\n0\r\n\r\n",
        "trailers": "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nAuthorization: Bearer x\r\n\r\n",
        "a bare line feed": "Content-Length: 2\n\n{}",
        "a NUL": "X\0: a\r\n\r\n",
        "no end": "X: a",
    }.items()
} | {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "Redis": b"*1\r\n$4\r\nPING\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /healthz\r\n",
    "HTTP/9.9": b"GET /healthz HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "an absolute target": b"GET http://evil.example/v1/jobs HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "CONNECT": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n",
    "an asterisk": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an unknown method": b"BREW /v1/jobs HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "line feeds only": b"GET /healthz HTTP/1.1\nHost: localhost\n\n",
    "random bytes": bytes(range(256)) * 20,
}

# --- Specs: bodies of POST /v1/jobs/validate --------------------------------------------------------------------------

_NUMBERS = ("1e399", "-1e399", "1" + "0" * 399, "-1", "0", "1e-400", "NaN", "Infinity", "9" * 5000, "1.5", "true", "[]")
_NUMERIC_FIELDS = ("max_steps", "seq_len", "batch_size", "learning_rate", "seed", "weight_decay", "warmup_steps")
_TEXTS = {
    "NUL": "a\0b",
    "an escape sequence": "\x1b]0;owned\x07\x1b[2J",
    "a bidirectional override": "abc\u202efdc",
    "a lone surrogate": "\ud800",
    "a noncharacter": "\uffff",
    "combining characters": "a" + "\u0301" * 5_000,
    "a path": "../../admin.key",
    "an absolute path": CANARY_FILE,
    "a URL": "http://169.254.169.254/latest/meta-data/",
    "a file URL": f"file://{CANARY_FILE}",
    "a template": "{{ ''.__class__.__mro__ }}{{ 7*7 }}${7*7}",
    "a format": "%s%n{0.__class__}",
    "a shell command": f"$(cat {CANARY_FILE})`id`; id | id",
    "an SQL statement": "'; DROP TABLE jobs; --",
    "a huge text": "a" * 50_000,
    "a pickle": "gASVKAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOU",
}
_TEXT_FIELDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "model": lambda text: {"model": text},
    "tokenizer": lambda text: {"tokenizer": text},
    "data path": lambda text: {"dataset": {"path": text}},
    "data file": lambda text: {"dataset": {"file": text}},
    "data hub": lambda text: {"dataset": {"hub": text}},
    "builder": lambda text: {"model": {"builder": text}},
    "model_type": lambda text: {"model": {"config": {**CONFIG, "model_type": text}}},
    "output_dir": lambda text: {"output_dir": text},
    "entity_name": lambda text: {"entity_name": text, "metadata": {text[:60]: text[:500]}},
    "resume": lambda text: {"resume_from_checkpoint": text},
}


def _spec(patch: Mapping[str, Any]) -> bytes:
    return json.dumps({**SPEC, **patch}).encode()


def _with_number(field: str, number: str) -> bytes:
    return _spec({field: 777_777}).replace(b"777777", number.encode())


SPECS: dict[str, bytes] = {
    **{f"{field} {number[:12]}": _with_number(field, number) for field in _NUMERIC_FIELDS for number in _NUMBERS},
    **{
        f"{field} is {name}": _spec(patch(text))
        for field, patch in _TEXT_FIELDS.items()
        for name, text in _TEXTS.items()
    },
    "deep lists": b'{"metadata": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "deep objects": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "an unfinished object": b'{"a": ',
    "a repeated name": b'{"model": 1, "model": 2}',
    "not UTF-8": b'{"entity_name": "\xff"}',
    "UTF-16": '{"entity_name": "a"}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "nothing": b"",
    "null": b"null",
    "many names": json.dumps({f"k{i}": i for i in range(3_000)}).encode(),
    "too large": b'{"entity_name": "' + b"a" * 200_000 + b'"}',
    "a huge config": _spec({"model": {"config": {**CONFIG, "hidden_size": 2**40, "vocab_size": 2**40}}}),
    "many layers": _spec({"model": {"config": {**CONFIG, "num_hidden_layers": 10**7}}}),
    "no heads": _spec({"model": {"config": {**CONFIG, "num_attention_heads": 0}}}),
    "code in a config": _spec({"model": {"config": {**CONFIG, "auto_map": {"AutoModel": "evil--x.Y"}}}}),
    "a kernel in a config": _spec({"model": {"config": {**CONFIG, "attn_implementation": "evil/kernel"}}}),
    "a path in a config": _spec({"model": {"config": {**CONFIG, "_name_or_path": CANARY_FILE}}}),
    "a slow regular expression": _spec({"lora": {"target_modules": "(a+)+$"}}),
    "a foreign environment": _spec({"env": {"LD_PRELOAD": "/tmp/evil.so"}}),
    "remote code": _spec({"trust_remote_code": True}),
    "prototype pollution": _spec({"__proto__": {"admin": True}, "constructor": {}}),
}
