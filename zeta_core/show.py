"""``python -m zeta_core show``: print rows of a dataset as the training would read them, token by token.

It reads a `ShowOrder` from standard input and prints one JSON object: `ShownRows`, or an error in the API's format
(exit code 1). Nothing is trained or stored, apart from caches of configs and tokenizers. Rows are only read, rendered
and tokenized in a confined process (`zeta_core.data.confined`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from zeta_core.contract import defaults
from zeta_core.contract.errors import InvalidRequest, ZetaError
from zeta_core.contract.shown_rows import ShownDocument, ShownRow, ShownRows, ShownToken, ShowOrder
from zeta_core.contract.sources import BuiltinSource, NamedModel, dataset_sources
from zeta_core.contract.spec import JobSpec, TrainerOptions
from zeta_core.contract.validation import parse
from zeta_core.data.confined import Position, confined
from zeta_core.data.encode import Encoded, Encoder
from zeta_core.data.source import Source
from zeta_core.data.sources import Places, open_sources
from zeta_core.data.template import is_default, set_template
from zeta_core.data.token_cache import make_encoder
from zeta_core.data.tokens import WHOLE_FORMATS
from zeta_core.failures import InvalidData
from zeta_core.model.facts import num_positions
from zeta_core.model.gguf import is_gguf
from zeta_core.model.sources import Located, locate_model, locate_tokenizer
from zeta_core.settings import home, variables

MOST_TOKENS = 20_000  # of a document that are shown
_CONTEXT = 4  # tokens that are decoded with the next one, because a character or space may depend on them


def main() -> int:
    try:
        print(show(ShowOrder.model_validate_json(sys.stdin.read())).model_dump_json())
    except ZetaError as error:
        print(error.body().model_dump_json())
        return 1
    return 0


def show(order: ShowOrder) -> ShownRows:
    """The requested rows. A row that is rejected has its error; other faults are raised."""
    given = dict(order.spec)
    model, named = given.pop("model", None), given.get("tokenizer")
    if isinstance(model, dict):
        model = parse(NamedModel, {"model": model}).model
    only_of_jobs = JobSpec.model_fields.keys() - TrainerOptions.model_fields.keys()
    options = parse(TrainerOptions, {name: value for name, value in given.items() if name not in only_of_jobs})
    places, cache = Places(any_path=True, weights=False), home() / "cache"
    located = None if model is None else locate_model(model, places, cache)
    tokenizer = _tokenizer(options.tokenizer, located, places)
    set_template(tokenizer, options.chat_template)
    sources = [source.with_format() for source in _open(options)]
    if flat := next((source.name for source in sources if source.flat is not None), None):
        raise InvalidRequest(f"{flat} is a flat file of ids without rows, so no rows can be shown.", param="dataset")
    method = options.method
    if "method" not in options.model_fields_set and sources[0].row_format == "preference":
        method = "dpo"
    today = datetime.now(UTC).date()
    encoder = make_encoder(sources, tokenizer, train_on=options.train_on, method=method, today=today)
    seq_len = defaults.seq_len(options, _positions(located)) or defaults.MAX_DEFAULT_SEQ_LEN
    with variables(TOKENIZERS_PARALLELISM="false"):
        rows = confined(lambda position: list(_rows(sources, encoder, tokenizer, seq_len, order, position)))
    if not rows:
        raise InvalidRequest(f"The dataset has no row {order.row}.", param="row")
    notes: list[str] = []
    if sources[0].row_format in WHOLE_FORMATS and (not tokenizer.chat_template or is_default(tokenizer.chat_template)):
        notes.append("The tokenizer has no chat template, so conversations are rendered as ChatML.")
    if named is None and (located is None or not located.has_tokenizer):
        notes.append("No tokenizer was named, so a token is a byte; name the one of your model with --model.")
    name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    return ShownRows(tokenizer=name, seq_len=seq_len, notes=notes, data=rows)


def _tokenizer(named: object, located: Located | None, places: Places) -> Any:
    if located is None:
        located = Located(_no_model, "", pretrained=False)
    return locate_tokenizer(named, located, places, home() / "cache")


def _no_model() -> Any:
    raise AssertionError("only the tokenizer is needed")


def _positions(located: Located | None) -> int:
    """The number of positions of the model, if its config states it."""
    import torch

    if located is None or located.needs_weights or (located.directory is not None and is_gguf(located.directory)):
        return defaults.MAX_DEFAULT_SEQ_LEN
    with torch.device("meta"):
        return num_positions(located.build()) or defaults.MAX_DEFAULT_SEQ_LEN


def _open(options: TrainerOptions) -> list[Source]:
    dataset = dataset_sources(options.dataset or BuiltinSource(builtin="python-docs"))
    return open_sources(dataset, Places(any_path=True), pretokenized=options.use_pretokenized, method=options.method)


def _rows(
    sources: Sequence[Source], encoder: Encoder, tokenizer: Any, seq_len: int, order: ShowOrder, position: Position
) -> Iterator[dict[str, Any]]:
    """The requested rows as JSON. A file that cannot be read further ends them with its error."""
    num_shown = 0
    for source in sources:
        position.move(source.after(0), "reading")
        try:
            for unit in source.units():
                for row in unit.rows():
                    if order.row is not None and row.number != order.row:
                        continue
                    shown = ShownRow(place=source.place(row.number))
                    try:
                        encoded = encoder.encode(source, [row], position)
                        shown = _shown(source, shown.place, encoded, tokenizer, seq_len)
                    except InvalidData as error:
                        shown = ShownRow(place=shown.place, error=error.message)
                    yield shown.model_dump()
                    num_shown += 1
                    if order.row is not None or num_shown >= order.rows:
                        return
                    position.move(source.after(0), "reading")
        except InvalidData as error:
            yield ShownRow(place=source.name, error=error.message).model_dump()
            return


def _shown(source: Source, place: str, encoded: Encoded, tokenizer: Any, seq_len: int) -> ShownRow:
    documents: list[ShownDocument] = []
    is_whole = source.row_format in WHOLE_FORMATS
    start = 0
    for length in encoded.lengths_D.tolist():
        ids = encoded.ids_N[start : start + length].tolist()[: MOST_TOKENS if is_whole else min(seq_len, MOST_TOKENS)]
        trained_N = encoded.supervised_N
        tokens = [
            ShownToken(
                id=token,
                text=text,
                trained=at > 0 if trained_N is None else bool(trained_N[start + at]),
                truncated=is_whole and at >= seq_len,
            )
            for at, (token, text) in enumerate(zip(ids, _texts(ids, tokenizer), strict=True))
        ]
        documents.append(ShownDocument(num_tokens=length, tokens=tokens))
        start += length
    return ShownRow(
        place=place,
        format=source.row_format,
        shape=source.shape or None,
        documents=documents,
        unused_columns=list(encoded.unused_columns),
        notes=list(_notes(encoded, source)),
    )


def _notes(encoded: Encoded, source: Source) -> Iterator[str]:
    if encoded.num_control_tokens and not source.allow_control_tokens:
        yield f"The text contains {encoded.num_control_tokens} control tokens, which are encoded as ordinary text."
    if encoded.num_unused_ends:
        yield "The turns after the last one that is trained on are not used."
    if encoded.num_split:
        yield "The template renders earlier turns differently once later ones follow, so each answer is a document."
    if encoded.num_untrained:
        yield "No token of this row is trained on, so the row is left out."
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
