"""Tables of hostile files: archives, models, tokenizers, chat templates and data files, each with a name."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.end_to_end.hostile_requests import CANARY_FILE
from tests.harness.model_archives import CONFIG, PICKLE, model_files, pack_tar, safetensors_file

# --- Archives ---------------------------------------------------------------------------------------------------------


def _tar(*entries: tuple[str, bytes, Mapping[str, Any]], pax: Mapping[str, str] | None = None) -> bytes:
    """A .tar of entries with attributes of `tarfile.TarInfo`, and one PAX header for all of them."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content, attributes in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.pax_headers = dict(pax or {})
            for attribute, value in attributes.items():
                setattr(entry, attribute, value)
            archive.addfile(entry, io.BytesIO(content))
    return made.getvalue()


_CONFIG = ("config.json", json.dumps(CONFIG).encode(), {})
_NAMES = {
    "above": "../config.json",
    "absolute": "/etc/cron.d/evil",
    "inside and above": "a/../../b",
    "a backslash": "..\\..\\b",
    "a drive": "C:\\b",
    "NUL": "a\0b",
    "an escape sequence": "\x1b[2J",
    "a long name": "a" * 300,
    "a deep path": "d/" * 2_000 + "x",
    "empty parts": "a//./b",
    "not UTF-8": "\udcff",
    "a device name": "con.txt/aux",
}
_TYPES = {
    "a symbolic link": {"type": tarfile.SYMTYPE, "linkname": CANARY_FILE},
    "a relative link": {"type": tarfile.SYMTYPE, "linkname": "../../admin.key"},
    "a hard link": {"type": tarfile.LNKTYPE, "linkname": CANARY_FILE},
    "a character device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
    "a block device": {"type": tarfile.BLKTYPE, "devmajor": 8, "devminor": 0},
    "a pipe": {"type": tarfile.FIFOTYPE},
    "a sparse file": {"type": tarfile.GNUTYPE_SPARSE},
    "an unknown type": {"type": b"Z"},
    "set-user-id": {"mode": 0o4777},
}
_PAX = {
    "a time that is not a number": {"mtime": "nan"},
    "an infinite time": {"mtime": "inf"},
    "a huge time": {"mtime": "1e399"},
    "a huge owner": {"uid": "9" * 400},
    "a size that is not a number": {"size": "nan"},
    "a negative size": {"size": "-1"},
    "a huge size": {"size": "9" * 30},
    "another path": {"path": "../../admin.key"},
    "another link": {"linkpath": CANARY_FILE},
    "sparse sizes": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 18},
    "a huge header": {"comment": "a" * 2_000_000},
}
ARCHIVES: dict[str, bytes] = {
    **{f"named {name}": _tar(_CONFIG, (text, b"x", {})) for name, text in _NAMES.items()},
    **{name: _tar(_CONFIG, ("model.safetensors", b"", attributes)) for name, attributes in _TYPES.items()},
    **{f"PAX: {name}": _tar(_CONFIG, pax=pax) for name, pax in _PAX.items()},
    "two of one name": _tar(_CONFIG, _CONFIG),
    "names that differ in case": _tar(_CONFIG, ("CONFIG.json", b"{}", {})),
    "a folder and file of one name": _tar(_CONFIG, ("a", b"x", {}), ("a/b", b"x", {})),
    "many files": _tar(_CONFIG, *((f"f{number}", b"", {}) for number in range(5_000))),
    "truncated": _tar(_CONFIG)[:700],
    "a wrong checksum": _tar(_CONFIG)[:148] + b"77777777" + _tar(_CONFIG)[156:],
    "empty": b"",
    "zeros": bytes(100_000),
    "compressed": gzip.compress(_tar(_CONFIG)),
    "a compression bomb": gzip.compress(bytes(50_000_000)),
    "a zip file": b"PK\x03\x04" + bytes(100),
    "an archive in an archive": _tar(_CONFIG, ("a.tar", _tar(_CONFIG), {})),
}

# --- Models and tokenizers --------------------------------------------------------------------------------------------

_WORDS = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}


def _model(**files: object) -> bytes:
    return pack_tar(model_files(**files))


def _tokenizer(config: Mapping[str, Any] | None = None, **parts: Any) -> bytes:
    content = {"version": "1.0", "added_tokens": [], "model": _WORDS, **parts}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}
    return _model(tokenizer__json=content, tokenizer_config__json=settings)


def _header(**tensor: Any) -> bytes:
    return safetensors_file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **tensor}})


# A pickle that would create a file (protocol 0: call `builtins.eval` with one text).
RUNS_CODE = b"cbuiltins\neval\n(S\"open('/tmp/zeta-hostile-pickle', 'w')\"\ntR."
MODELS: dict[str, bytes] = {
    "a pickle": _model(pytorch_model__bin=PICKLE),
    "a pickle that runs code": _model(pytorch_model__bin=RUNS_CODE),
    "a pickle named safetensors": _model(model__safetensors=PICKLE),
    "a pickle named json": _model(tokenizer__json=PICKLE),
    "python code": _model(modeling_evil__py="import os"),
    "auto_map": pack_tar({"config.json": {**CONFIG, "auto_map": {"AutoModel": "modeling_evil.X"}}}),
    "a list as config": pack_tar({"config.json": [1]}),
    "a broken config": pack_tar({"config.json": b"{"}),
    "a deep config": pack_tar({"config.json": b"[" * 50_000}),
    "a config with a huge number": pack_tar({"config.json": json.dumps(CONFIG).replace("384", "1" + "0" * 399)}),
    "a config with NaN": pack_tar({"config.json": json.dumps(CONFIG).replace("384", "NaN")}),
    "no config": pack_tar({"a.txt": "x"}),
    "a path to weights": _model(model__safetensors__index__json={"weight_map": {"x": "../../admin.key"}}),
    "an absolute path to weights": _model(model__safetensors__index__json={"weight_map": {"x": CANARY_FILE}}),
    "an unknown dtype": _model(model__safetensors=_header(dtype="X9")),
    "a negative shape": _model(model__safetensors=_header(shape=[-1])),
    "a huge shape": _model(model__safetensors=_header(shape=[2**62, 2**62])),
    "offsets beyond the end": _model(model__safetensors=_header(data_offsets=[0, 2**60])),
    "reversed offsets": _model(model__safetensors=_header(data_offsets=[8, 0])),
    "a header longer than the file": _model(model__safetensors=safetensors_file(length=2**60)),
    "a header that is not JSON": _model(model__safetensors=safetensors_file(b"{{{{{{{{")),
    "an adapter of a path": _model(adapter_config__json={"base_model_name_or_path": "/etc", "peft_type": "LORA"}),
    "a template file of a path": _tokenizer({"chat_template": "{% include '" + CANARY_FILE + "' %}"}),
    "a vocabulary of a path": _tokenizer({"vocab_file": CANARY_FILE, "merges_file": "../../admin.key"}),
    "a tokenizer class with code": _tokenizer({"auto_map": {"AutoTokenizer": ["evil.X", None]}}),
    "an unknown tokenizer class": _tokenizer({"tokenizer_class": "os.system"}),
    "a fixed length of zero": _tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a broken normalizer": _tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "a broken regular expression": _tokenizer(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    ),
    "a slow regular expression": _tokenizer(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a|aa|.)+$^"}, "behavior": "Isolated", "invert": False}
    ),
    "an absent special token": _tokenizer(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "no unknown token": _tokenizer(model={**_WORDS, "vocab": {"a": 0}}),
    "an empty vocabulary": _tokenizer(model={"type": "Unigram", "vocab": [], "unk_id": 5}),
    "merges without vocabulary": _tokenizer(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}),
    "huge ids": _tokenizer(model={**_WORDS, "vocab": {"a": 2**31, "[UNK]": 1}}),
    "negative ids": _tokenizer(model={**_WORDS, "vocab": {"a": -1, "[UNK]": 1}}),
}
GGUF: dict[str, bytes] = {
    "no header": b"GGUF",
    "a huge count": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60),
    "an unknown version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "a huge key": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62),
    "another file": b"\x7fELF" + bytes(100),
}

# --- Chat templates: of a spec, for messages --------------------------------------------------------------------------

TEMPLATES: dict[str, str] = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].environ }}",
    "the initializer": "{{ messages.__init__.__globals__ }}",
    "an attribute by filter": "{{ ''|attr('__class__') }}",
    "a format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "an include": "{% include '" + CANARY_FILE + "' %}",
    "an import": "{% import 'os' as os %}{{ os.environ }}",
    "an extension": "{% extends '" + CANARY_FILE + "' %}",
    "a mutation": "{{ messages.append(1) }}{{ messages.clear() }}",
    "a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 10**(10**8) }}",
    "a large text": "{{ 'a' * 10**10 }}",
    "a recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "an unfinished block": "{% for m in messages %}",
    "nothing": "{# nothing #}",
}

# --- Data files -------------------------------------------------------------------------------------------------------


def _table() -> Any:
    return pa.table({"text": ["hello world " * 20] * 300})


def _parquet() -> bytes:
    made = io.BytesIO()
    pq.write_table(_table(), made)  # pyright: ignore[reportUnknownMemberType]
    return made.getvalue()


def _arrow() -> bytes:
    made = io.BytesIO()
    with pa.ipc.new_stream(made, _table().schema) as writer:
        writer.write_table(_table(), max_chunksize=100)
    return made.getvalue()


def _npy(dtype: str, shape: str) -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64)


def _damaged(content: bytes) -> Sequence[tuple[str, bytes]]:
    third = len(content) // 3
    return (
        ("truncated", content[: 2 * third]),
        ("without its end", content[:-4]),
        ("with zeros", content[:third] + bytes(third) + content[2 * third :]),
        ("with wrong bytes", bytes(byte ^ (0xFF if at % 97 == 50 else 0) for at, byte in enumerate(content))),
        ("with a huge length", content[:8] + b"\xff\xff\xff\x7f" + content[12:]),
    )


DATA: dict[str, tuple[str, bytes]] = {
    **{f"Parquet {name}": ("a.parquet", content) for name, content in _damaged(_parquet())},
    **{f"Arrow {name}": ("a.arrow", content) for name, content in _damaged(_arrow())},
    "a pickle": ("a.jsonl", RUNS_CODE),
    "a NumPy pickle": (
        "a.npy",
        _npy("'|O'", "(1,)"),
    ),
    "a huge NumPy shape": (
        "a.npy",
        _npy("'<u2'", "(9999999999,)"),
    ),
    "a gzip bomb": ("a.txt.gz", gzip.compress(b"a" * 30_000_000)),
    "a truncated gzip file": ("a.txt.gz", gzip.compress(b"hello world" * 1_000)[:-9]),
    "deep JSON": ("a.jsonl", b"[" * 100_000),
    "a huge number": ("a.jsonl", b'{"text": "a", "n": 1' + b"0" * 9_999 + b"}"),
    "NaN": ("a.jsonl", b'{"text": NaN}'),
    "a lone surrogate": ("a.jsonl", b'{"text": "\\ud800"}'),
    "not UTF-8": ("a.txt", b"\xff\xfe\xfd" * 100),
    "NUL bytes": ("a.txt", bytes(10_000)),
    "an escape sequence": ("a.jsonl", b'{"\\u001b[2J": "x"}'),
    "a CSV formula": ("a.csv", b"text\n\"=cmd|' /C calc'!A0\"\n"),
    "an unfinished quote": ("a.csv", b'text\n"abc\n' * 1_000),
    "many columns": ("a.csv", ",".join(f"c{i}" for i in range(20_000)).encode() + b"\n1\n"),
    "ids beyond every type": ("a.jsonl", b'{"input_ids": [99999999999999999999999]}'),
    "negative ids": ("a.jsonl", b'{"input_ids": [-1, -2]}'),
    "an odd length": ("a.bin", b"\1\2\3"),
    "an empty file": ("a.txt", b""),
    "a name with a path": ("../../admin.key.txt", b"x y z"),
    "a name with an escape sequence": ("\x1b[2Ja.txt", b"x y z"),
    "a name with a line end": ("a\r\nX-Injected: yes.txt", b"x y z"),
    "a long name": ("a" * 5_000 + ".txt", b"x"),
    "an unknown type": ("a.exe", b"MZ"),
}

PAIR, ANSWER = {"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "completion": "c", "label": True}
# Rows of preferences, with the method that reads them.
PREFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "chosen is a number": ("dpo", {**PAIR, "chosen": 7}),
    "rejected is missing": ("orpo", {"prompt": "p", "chosen": "c", "rejected": None}),
    "a prompt without an end": ("orpo", {**PAIR, "prompt": "p" * 200_000}),
    "answers are equal and empty": ("orpo", {"prompt": "", "chosen": "", "rejected": ""}),
    "an answer of an unknown role": ("dpo", {**PAIR, "chosen": [{"role": "\x1b[2J", "content": "c"}]}),
    "an answer with deep contents": ("dpo", {**PAIR, "chosen": [{"role": "assistant", "content": [[[[{}]]]]}]}),
    "an answer as an object": ("dpo", {**PAIR, "rejected": {"role": "assistant", "content": "r"}}),
    "tools that are code": ("dpo", {**PAIR, "tools": "__import__('os').system('id')"}),
    "a label as text": ("kto", {**ANSWER, "label": "true"}),
    "a label beyond every number": ("kto", {**ANSWER, "label": 10**400}),
    "a label as a list": ("kto", {**ANSWER, "label": [True]}),
    "a completion as a number": ("kto", {**ANSWER, "completion": 1e308}),
    "labels of one kind only": ("kto", ANSWER),
}
