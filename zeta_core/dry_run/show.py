"""``python -m zeta_core show``: print rows of a dataset as a run would read them, token by token.

It reads a `ShowRequest` from standard input and prints one JSON object: `ShownRows`, or an error in the API's format
(exit code 1). Nothing is trained or stored, apart from caches of configs and tokenizers. Rows are only read, rendered
and tokenized in a sandboxed process (`zeta_core.data.sandbox`). `show_on_worker` does the same for
``POST /v1/jobs/preview``, in the process that checks specs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np

from zeta_core.contract.errors import InvalidRequest, ZetaError
from zeta_core.contract.job.data_preview import (
    RowSelection,
    ShownDocument,
    ShownRow,
    ShownRows,
    ShownToken,
    ShowRequest,
)
from zeta_core.contract.spec import defaults
from zeta_core.contract.spec.job_spec import JobSpec, TrainerOptions
from zeta_core.contract.spec.sources import PREFERENCE_FORMATS, NamedModel, dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.contract.wire.run_directory import RunFile
from zeta_core.data.documents.template import is_default, set_template
from zeta_core.data.rows.row import Row
from zeta_core.data.sandbox import Position, run_in_sandbox
from zeta_core.data.sequences import Overlong
from zeta_core.data.sources import Source, SourceLocations, open_sources
from zeta_core.data.tokens import WHOLE_FORMATS
from zeta_core.data.tokens.cache import make_encoder
from zeta_core.data.tokens.encoder import Encoded, Encoder
from zeta_core.environment import home, standard_output_reserved, variables
from zeta_core.failures import InvalidData
from zeta_core.model.gguf import is_gguf
from zeta_core.model.inspection import num_positions
from zeta_core.model.located_model import LocatedModel
from zeta_core.model.sources import locate_model
from zeta_core.model.tokenizer import locate_tokenizer

MAX_TOKENS = 20_000  # of a document that are shown
MAX_PREVIEW_DOCUMENT_TOKENS, MAX_PREVIEW_TOKENS = 2000, 6000  # in an answer of the server: of a document, and in all
MAX_TEXT_BYTES = 4 << 20  # of a text file that are tokenized
NOTHING_LEFT = "nothing is trained on within seq_len, so a run drops this row; raise seq_len"
_CONTEXT = 4  # tokens that are decoded with the next one, because a character or space may depend on them


def main() -> int:
    with standard_output_reserved() as out:
        try:
            answer, exit_code = show(ShowRequest.model_validate_json(sys.stdin.buffer.read())), 0
        except ZetaError as error:
            error.message = " ".join(filter(None, (error.message, getattr(error, "hint", None))))
            answer, exit_code = error.body(), 1
        out.write(answer.model_dump_json() + "\n")
    return exit_code


def show(request: ShowRequest) -> ShownRows:
    """The requested rows of local data. A row that is rejected has its error; other faults are raised."""
    locations = SourceLocations(any_path=True, fetch_weights=False)
    limits = _Limits(document_tokens=MAX_TOKENS)
    return _show(request, locations, home() / "cache", limits)


def show_on_worker(file: RunFile, selection: RowSelection) -> ShownRows:
    """The selected rows of a job's data, shortened to an answer of limited size."""
    locations = SourceLocations.of_run(file, fetch_weights=False)
    request = ShowRequest(spec=file.spec, rows=selection.rows, row=selection.row)
    limits = _Limits(document_tokens=MAX_PREVIEW_DOCUMENT_TOKENS, tokens=MAX_PREVIEW_TOKENS)
    return _show(request, locations, file.cache, limits)


def _show(request: ShowRequest, locations: SourceLocations, cache: Path, limits: _Limits) -> ShownRows:
    spec = dict(request.spec)
    model, named = spec.pop("model", None), spec.get("tokenizer")
    if isinstance(model, dict):
        model = parse(NamedModel, {"model": model}).model
    only_of_jobs = JobSpec.model_fields.keys() - TrainerOptions.model_fields.keys()
    options = parse(TrainerOptions, {name: value for name, value in spec.items() if name not in only_of_jobs})
    located = None if model is None else locate_model(model, locations, cache)
    tokenizer = _tokenizer(options.tokenizer, located, locations, cache)
    set_template(tokenizer, options.chat_template)
    sources = [source.with_format() for source in _open(options, locations)]
    if flat := next((source.name for source in sources if source.flat is not None), None):
        raise InvalidRequest(f"{flat} is a flat file of ids without rows, so no rows can be shown.", param="dataset")
    encoder = _encoder(sources, tokenizer, options)
    seq_len = defaults.seq_len(options, _positions(located)) or defaults.MAX_DEFAULT_SEQ_LEN
    cut = _Cut(seq_len, options.overlong, limits)
    with variables(TOKENIZERS_PARALLELISM="false"):
        rows = run_in_sandbox(lambda position: list(_rows(sources, encoder, tokenizer, cut, request, position)))
    if not rows:
        raise InvalidRequest(f"The dataset has no row {request.row}.", param="row")
    notes: list[str] = []
    if sources[0].row_format in WHOLE_FORMATS and (not tokenizer.chat_template or is_default(tokenizer.chat_template)):
        notes.append("The tokenizer has no chat template, so conversations are rendered as ChatML.")
    if named is None and (located is None or not located.has_tokenizer):
        notes.append("No tokenizer was given, so each byte is a token; set model or tokenizer (--model, --tokenizer).")
    name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    return ShownRows(tokenizer=name, seq_len=seq_len, notes=notes, data=rows)


@dataclass
class _Limits:
    """How many tokens are shown: of each document, and ``tokens`` in all that remain (``None``: any number)."""

    document_tokens: int
    tokens: int | None = None

    def take(self, wanted: int) -> int:
        """The number of tokens that may be shown of a document with ``wanted`` tokens."""
        number = min(wanted, self.document_tokens)
        if self.tokens is not None:
            number = min(number, self.tokens)
            self.tokens -= number
        return number


@dataclass(frozen=True)
class _Cut:
    """What happens to documents longer than ``seq_len``, and how much of them is shown."""

    seq_len: int
    overlong: Overlong | None
    limits: _Limits


def _encoder(sources: Sequence[Source], tokenizer: Any, options: TrainerOptions) -> Encoder:
    today = datetime.now(UTC).date()
    try:
        return make_encoder(sources, tokenizer, train_on=options.train_on, method=options.method, today=today)
    except InvalidData as error:
        formats = {source.row_format for source in sources}
        methods = [name for name, read in PREFERENCE_FORMATS.items() if read in formats]
        if methods and options.method not in methods:
            raise InvalidData(error.message, hint=f"In this command: --set method={methods[0]}.") from error
        raise


def _tokenizer(named: object, located: LocatedModel | None, locations: SourceLocations, cache: Path) -> Any:
    if located is None:
        located = LocatedModel(_no_model, "", pretrained=False)
    return locate_tokenizer(named, located, locations, cache)


def _no_model() -> Any:
    raise AssertionError("only the tokenizer is needed")


def _positions(located: LocatedModel | None) -> int:
    """The number of positions of the model, if its config states it."""
    import torch

    if located is None or located.needs_weights or (located.directory is not None and is_gguf(located.directory)):
        return defaults.MAX_DEFAULT_SEQ_LEN
    with torch.device("meta"):
        return num_positions(located.build()) or defaults.MAX_DEFAULT_SEQ_LEN


def _open(options: TrainerOptions, locations: SourceLocations) -> list[Source]:
    dataset = dataset_sources(options.dataset or defaults.DATASET)
    sources = open_sources(dataset, locations, pretokenized=options.use_pretokenized, method=options.method)
    return [replace(source, group_by=options.group_by) for source in sources]


def _rows(
    sources: Sequence[Source], encoder: Encoder, tokenizer: Any, cut: _Cut, request: ShowRequest, position: Position
) -> Iterator[dict[str, Any]]:
    """The requested rows as JSON. A file that cannot be read further ends them with its error."""
    num_shown = 0
    for source in sources:
        position.move(source.after(0), "reading")
        try:
            for pieces in _documents(source):
                number = pieces[0].number
                if request.row is not None and number != request.row:
                    continue
                shown = ShownRow(place=source.location(number))
                try:
                    encoded = encoder.encode(source, pieces, position)
                    shown = _shown(source, shown.place, encoded, tokenizer, cut)
                except InvalidData as error:
                    shown = ShownRow(place=shown.place, error=error.message)
                yield shown.model_dump()
                num_shown += 1
                if request.row is not None or num_shown >= request.rows:
                    return
                position.move(source.after(0), "reading")
        except InvalidData as error:
            yield ShownRow(place=source.name, error=error.message).model_dump()
            return


def _documents(source: Source) -> Iterator[list[Row]]:
    """Each row, or the pieces of a text file, which is one document. Only the beginning of a large file is read."""
    pieces: list[Row] = []
    for unit in source.units():
        for row in unit.rows():
            pieces.append(row)
            if row.ends_document or (source.is_one_document and unit.position >= MAX_TEXT_BYTES):
                yield pieces
                pieces = []
                if source.is_one_document:
                    return


def _lengths(encoded: Encoded) -> list[int]:
    """The number of tokens of each document."""
    bounds = [0, *(np.flatnonzero(encoded.ends_D[:-1]) + 1).tolist()] if len(encoded.lengths_D) else []
    return np.add.reduceat(encoded.lengths_D, bounds).tolist() if bounds else []


def _shown(source: Source, location: str, encoded: Encoded, tokenizer: Any, cut: _Cut) -> ShownRow:
    documents: list[ShownDocument] = []
    supervised_N = encoded.supervised_N
    is_whole = source.row_format in WHOLE_FORMATS or supervised_N is not None
    is_fitted = is_whole or cut.overlong is not None
    is_learned = True
    start = 0
    for length in _lengths(encoded):
        if cut.overlong == "error" and length > cut.seq_len:
            raise InvalidData(
                f"{location} has {length:,} tokens, more than the {cut.seq_len:,} of seq_len. Raise seq_len, or set "
                "overlong to 'truncate' or 'drop'."
            )
        trained_T = np.ones(length, np.bool_) if supervised_N is None else supervised_N[start : start + length].copy()
        trained_T[:1] = False  # the first token has no context to be predicted from
        end = cut.seq_len if is_fitted else length
        is_learned &= bool(trained_T[:end].any()) or length <= end
        num_shown = cut.limits.take(length if is_fitted else min(length, cut.seq_len))
        ids = encoded.ids_N[start : start + length].tolist()[:num_shown]
        tokens = [
            ShownToken(id=token, text=text, trained=bool(trained_T[at]), truncated=at >= end)
            for at, (token, text) in enumerate(zip(ids, _texts(ids, tokenizer), strict=True))
        ]
        documents.append(
            ShownDocument(
                num_tokens=length,
                num_trained=int(trained_T[:end].sum()),
                num_truncated=max(0, length - end),
                split=not is_fitted and length > cut.seq_len,
                tokens=tokens,
            )
        )
        start += length
    notes = list(_notes(encoded, source))
    if len(encoded.ends_D) and not encoded.ends_D[-1]:
        notes.append(f"Only the beginning of the document is shown and counted: the first {MAX_TEXT_BYTES >> 20} MiB.")
    if cut.overlong == "drop" and any(document.num_truncated for document in documents):
        notes.append("overlong is 'drop' and the row is longer than seq_len, so a run drops it; raise seq_len")
    elif not is_learned:
        notes.append(NOTHING_LEFT)
    return ShownRow(
        place=location,
        format=source.row_format,
        shape=source.shape or None,
        documents=documents,
        unused_columns=list(encoded.unused_columns),
        notes=notes,
    )


def _notes(encoded: Encoded, source: Source) -> Iterator[str]:
    if encoded.num_control_tokens and not source.allow_control_tokens:
        yield f"The text contains {encoded.num_control_tokens} control tokens, which are encoded as ordinary text."
    if encoded.num_with_unused_turns:
        yield "The turns after the last one that is trained on are not used."
    if encoded.num_split:
        yield "The template renders earlier turns differently once later ones follow, so each answer is a document."
    if encoded.num_untrained:
        yield "No token of this row is trained on, so a run drops the row."
    if encoded.num_padding:
        yield f"{encoded.num_padding} padding tokens are removed."


def _texts(ids: Sequence[int], tokenizer: Any) -> Iterator[str]:
    """The text of each token. A token that is only a part of a character, or unknown to the tokenizer, is ``<ID>``."""

    def decode(part: Sequence[int]) -> str:
        return cast(str, tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    for at, token in enumerate(ids):
        before = ids[max(0, at - _CONTEXT) : at]
        try:
            earlier, text = decode(before) if before else "", decode([*before, token])
        except (IndexError, KeyError, OverflowError, TypeError):
            yield f"<{token}>"
            continue
        piece = text[len(earlier) :] if text.startswith(earlier) else ""
        yield f"<{token}>" if not piece or "\ufffd" in piece else piece
