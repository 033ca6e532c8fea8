"""The data report: statistics of the data that a run trains on, a summary in one sentence, and warnings."""

from __future__ import annotations

import numpy as np

from zeta_core.contract.job.data_report import DataReport, Lengths, SourceShare
from zeta_core.contract.job.events import LogLine
from zeta_core.contract.printable import printable
from zeta_core.data.sequences import Mixture, Sequences, build_sampler
from zeta_core.data.sequences.packing import OverlongCounts
from zeta_core.data.tokens import TokenFile
from zeta_core.data.tokens.held_out import Overlap, RowClusters
from zeta_core.failures import InvalidData
from zeta_core.plan import Plan
from zeta_core.report.reporter import Reporter

_MAX_SUPERVISED = 1_000_000  # sequences that are all counted; beyond that, an evenly spaced sample is


def describe_data(tokens: TokenFile, sequences: Sequences, plan: Plan) -> DataReport:
    """Statistics of the data, as cut into ``sequences`` and seen by the run. No second pass over the ids is needed."""
    lengths = np.diff(tokens.offsets)
    p50, p90, p99 = (int(p) for p in np.percentile(lengths, (50, 90, 99), method="lower"))
    every = np.arange(len(sequences), step=max(1, len(sequences) // _MAX_SUPERVISED))
    num_tokens = sequences.num_tokens(every)
    return DataReport(
        formats=tokens.formats,
        documents=tokens.num_documents,
        tokens=tokens.num_tokens,
        lengths=Lengths(
            min=int(lengths.min()),
            median=p50,
            mean=round(float(lengths.mean()), 1),
            p90=p90,
            p99=p99,
            max=int(lengths.max()),
        ),
        sequences=len(sequences),
        supervised_share=round(sequences.num_target_tokens(every) / max(1, num_tokens), 4),
        filled_share=round(num_tokens / sequences.capacity(every), 4),
        truncated=sequences.overlong_counts.num_truncated,
        truncated_tokens=sequences.overlong_counts.num_cut_tokens,
        dropped=sequences.overlong_counts.num_dropped,
        empty=tokens.num_empty,
        split=tokens.num_split,
        untrained=tokens.num_untrained,
        padding_tokens=tokens.num_padding,
        masks=list(tokens.masks),
        duplicates=tokens.num_duplicates,
        control_tokens=tokens.num_control_tokens,
        shapes=sorted({origin.shape for origin in tokens.origins if origin.shape}),
        unused_columns=list(tokens.unused_columns),
        sources=_shares(tokens, sequences, plan),
    )


def _shares(tokens: TokenFile, sequences: Sequences, plan: Plan) -> list[SourceShare]:
    sampler = build_sampler(sequences, plan.seed)
    if tokens.mix is None or not isinstance(sampler, Mixture):
        return []
    total = plan.total_sequences
    of_origins = list(zip(tokens.mix.source_of, tokens.origins, strict=True))
    bounds = tokens.source_bounds
    shares: list[SourceShare] = []
    for number, seen in enumerate(sampler.seen(total)):
        names = [origin.name for source, origin in of_origins if source == number]
        first, last = bounds[number : number + 2]
        num_sequences = int(np.diff(sampler.bounds)[number])
        shares.append(
            SourceShare(
                name=names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more",
                documents=int(last - first),
                tokens=int(tokens.offsets[last] - tokens.offsets[first]),
                sequences=num_sequences,
                share=round(tokens.mix.shares[number], 6),
                seen=seen,
                seen_share=round(seen / total, 6),
                passes=round(seen / num_sequences, 4),
            )
        )
    return shares


def nothing_to_train_error(tokens: TokenFile, sequences: Sequences) -> InvalidData:
    """The error for data without a single sequence, with the number of overlong documents and the first one."""
    dropped = sequences.overlong_counts.num_dropped
    if not dropped:
        return InvalidData("The data contains no document that can be trained on; provide more text, or raise seq_len.")
    return InvalidData(
        f"None of the {tokens.num_documents:,} documents can be trained on: {dropped:,} are longer than the "
        f"{sequences.seq_len:,} tokens of seq_len, or their answer lies beyond it; the first is "
        f"{sequences.overlong_counts.dropped_at}.",
        hint=f"Raise seq_len; the longest document has {int(np.diff(tokens.offsets).max()):,} tokens.",
        evidence={"dropped_documents": dropped},
    )


def report_data(data: DataReport, tokens: TokenFile, sequences: Sequences, report: Reporter) -> None:
    """Emit one ``log`` event with the statistics, and a warning for everything that may be unexpected."""
    lengths = data.lengths
    summary = (
        f"Data: {_count(data.documents, 'document')}, {_count(data.tokens, 'token')} (median {lengths.median:,}, "
        f"max {lengths.max:,} per document), {_count(data.sequences, 'sequence')} of up to {sequences.seq_len:,} "
        f"tokens, {100 * data.supervised_share:.0f} % of tokens trained on"
    )
    more = {"truncated": data.truncated, "dropped": data.dropped, "empty": data.empty}
    details = [f"{count:,} {word}" for word, count in more.items() if count]
    more = {"duplicate": data.duplicates, "control token": data.control_tokens}
    details += [_count(count, noun) for noun, count in more.items() if count]
    if data.padding_tokens:
        details.append(f"{_count(data.padding_tokens, 'padding token')} removed")
    report.write(LogLine(message=f"{', '.join([summary, *details])}.", data=data))
    if data.sources:
        mixed = [f"{source.name} {source.seen_share:.1%} ({source.passes:.3g} passes)" for source in data.sources]
        report.log(f"Share of each source in the sequences of this run: {', '.join(mixed)}.")
    _log_columns(tokens, report)
    _warn_of_overlong(sequences.overlong_counts, _count(data.documents, "document"), "trained on", report)
    if data.untrained:
        report.warn(
            "rows_not_trained_on",
            f"{'1 row is' if data.untrained == 1 else f'{data.untrained:,} rows are'} omitted, because "
            f"{' and '.join(data.masks)} exclude all tokens.",
        )
    if data.split:
        report.warn(
            "conversations_split",
            f"{_count(data.split, 'conversation')} will be trained on one turn at a time, because the chat template "
            "renders earlier turns differently once later ones follow; the history is repeated for each turn.",
        )
    _log_turns(tokens, report)


def _log_columns(tokens: TokenFile, report: Reporter) -> None:
    for shape in sorted({origin.shape for origin in tokens.origins if origin.shape}):
        names = [origin.name for origin in tokens.origins if origin.shape == shape]
        row_format = next(origin.row_format for origin in tokens.origins if origin.shape == shape)
        where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more files"
        report.log(f"{where}: rows of the shape {shape} are converted to the format {row_format}.")
    if tokens.unused_columns:
        report.log(f"Columns of the data that are not used: {', '.join(map(printable, tokens.unused_columns))}.")


def _log_turns(tokens: TokenFile, report: Reporter) -> None:
    if tokens.num_control_tokens:
        report.warn(
            "control_tokens_in_text",
            f"The texts of the data contain {_count(tokens.num_control_tokens, 'control token')}, the first one in "
            f"{tokens.first_control_token}. They are encoded as ordinary text, unless the source sets "
            '"allow_control_tokens": true. Set it for texts that a chat template has already rendered.',
        )
    if tokens.num_with_unused_turns:
        continues = "conversation continues" if tokens.num_with_unused_turns == 1 else "conversations continue"
        report.warn(
            "turns_not_used",
            f"{tokens.num_with_unused_turns:,} {continues} after the last turn that is trained on; the turns after it "
            "are not used.",
        )


def report_held_out(tokens: TokenFile, sequences: Sequences, report: Reporter) -> None:
    """Warn about held-out documents that are too long to be evaluated as a whole."""
    _warn_of_overlong(sequences.overlong_counts, f"{tokens.num_documents:,} held-out documents", "evaluated on", report)


def report_overlap(overlap: Overlap, held_out: TokenFile, eval_split: float | None, report: Reporter) -> None:
    """Report the size of the held-out part, and warn about rows that are both trained on and evaluated."""
    if eval_split:
        rows = len(RowClusters.of(held_out).first_U)
        copies = f", {overlap.num_duplicates:,} of them copies" if overlap.num_duplicates else ""
        report.log(f"Held out by eval_split: {rows:,} row{'' if rows == 1 else 's'}{copies}.")
    if overlap.num_removed:
        report.log(
            f"{_count(overlap.num_removed, 'document')} of held-out conversations will not be evaluated, because "
            "training conversations contain the same turns."
        )
    if overlap.num_trained:
        report.warn(
            "evaluated_on_training_data",
            f"eval_dataset contains {_count(overlap.num_trained, 'exact copy', 'exact copies')} of training rows, so "
            "its loss is too low; remove the copies from one of the two.",
        )


def _warn_of_overlong(counts: OverlongCounts, documents: str, used: str, report: Reporter) -> None:
    if counts.num_truncated:
        report.warn(
            "documents_truncated",
            f"{counts.num_truncated:,} of {documents} are longer than seq_len and are truncated, "
            f"by {_count(counts.num_cut_tokens, 'token')} in total; the first is {counts.truncated_at}. Raise seq_len, "
            "or set overlong to 'drop' or 'error'.",
        )
    if counts.num_dropped:
        report.warn(
            "documents_dropped",
            f"{counts.num_dropped:,} of {documents} are not {used}, because they are longer than seq_len "
            f"or their answer lies beyond it; the first is {counts.dropped_at}. Raise seq_len.",
        )


def _count(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun, such as ``1 row`` or ``2,000 rows``."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
