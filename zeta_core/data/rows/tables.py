"""Reading rows from Parquet files, and from Arrow files and streams, in parts of limited size.

All data is untrusted. The footer of a Parquet file is checked before pyarrow reads it. The buffers of an Arrow file are
fully validated before a value is read, because pyarrow maps the file and follows its offsets without checking them.
Errors are `InvalidData` and name the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from zeta_core.data.rows.parquet_footer import check_footer
from zeta_core.data.rows.row import ChooseColumns, Row, Unit
from zeta_core.failures import InvalidData

READ_BYTES = 1 << 20  # read buffer per column; a row group may be the whole file
BATCH_ROWS = 1024
BATCH_BYTES = 1 << 26  # size of a Parquet batch according to the metadata
UNIT_ROWS = 256  # conversations are long, and as Python objects they are many times larger
MAX_UNIT_BYTES = 1 << 23


Batches = Iterator[tuple[Any, tuple[str, ...]]]  # record batches, and the names of the columns that were not read


def table_units(batches: Batches, name: str) -> Iterator[Unit]:
    position = 0
    for batch, unread in batches:
        for part in _parts(batch):

            def load(part: Any = part, first: int = position + 1, unread: tuple[str, ...] = unread) -> Iterator[Row]:
                try:
                    columns = {name: _without_empty_fields(values) for name, values in part.to_pydict().items()}
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    raise _not_utf8(name, first, first + part.num_rows - 1, f" (byte {byte:#04x})") from error
                except (ValueError, OverflowError) as error:  # for example, a date that Python cannot represent
                    raise InvalidData(
                        f"{name} contains a value in row {first} or later that cannot be read: {error}."
                    ) from error
                for index in range(part.num_rows):
                    fields = {column: values[index] for column, values in columns.items()}
                    yield Row(first + index, fields, unread=unread)

            position += part.num_rows
            yield Unit(load, position)


def num_rows(path: Path, name: str, suffix: str) -> int:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if suffix != ".parquet":
        return sum(batch.num_rows for batch, _ in _arrow_batches(path, name, lambda names, _: names[:1]))
    try:
        check_footer(path)
        return parquet.ParquetFile(path).metadata.num_rows
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _unreadable(error, name, "parquet") from error


def parquet_batches(path: Path, name: str, choose: ChooseColumns) -> Batches:
    """Read batches of rows. The larger the rows according to the metadata, the fewer rows are in a batch.

    Equal values are stored only once, so a row may be far larger than the metadata indicates. Only the memory limit of
    the process covers that case (`zeta_core.data.sandbox`).
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        check_footer(path)
        file = parquet.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False)
        chosen, unread = _chosen(file.schema_arrow, name, choose)
        for index in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(index)
            each = max(1, group.total_byte_size // max(1, group.num_rows))
            batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // each))
            for batch in file.iter_batches(
                batch_size=batch_rows, row_groups=[index], columns=chosen, use_threads=False
            ):
                yield batch.select(chosen), unread  # the name of a column may be the beginning of another one
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _unreadable(error, name, "parquet") from error


def arrow_batches(path: Path, name: str, choose: ChooseColumns) -> Batches:
    """Read the record batches of a file or stream, and validate each fully."""
    position = 0
    for batch, unread in _arrow_batches(path, name, choose):
        _validate(batch, name, position + 1, position + batch.num_rows)
        position += batch.num_rows
        yield batch, unread


def _arrow_batches(path: Path, name: str, choose: ChooseColumns) -> Batches:
    import pyarrow as pa

    def opened(options: Any = None) -> Any:
        memory.seek(0)
        try:
            return pa.ipc.open_stream(memory, options=options)
        except pa.ArrowInvalid:
            memory.seek(0)
            return pa.ipc.open_file(memory, options=options)

    try:
        with pa.memory_map(str(path)) as memory:
            schema = opened().schema
            chosen, unread = _chosen(schema, name, choose)
            # An empty list would mean all fields.
            reader = opened(
                pa.ipc.IpcReadOptions(included_fields=[schema.names.index(column) for column in chosen] or [0])
            )
            is_file = hasattr(reader, "num_record_batches")
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                yield (batch if chosen else batch.select([])), unread
            if not is_file and memory.tell() != memory.size():  # damaged bytes may look like the end of the stream
                raise ValueError(f"the stream ends at byte {memory.tell()} of {memory.size()}")
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _unreadable(error, name, "Arrow") from error


def _chosen(schema: Any, name: str, choose: ChooseColumns) -> tuple[list[str], tuple[str, ...]]:
    """The columns to read and the others. Raises `InvalidData` if several have the same name."""
    names: list[str] = schema.names
    if twice := next((column for column in names if names.count(column) > 1), None):
        raise InvalidData(f"{name} has several columns named {twice!r}; rename all but one of them.")
    chosen = list(choose(names, [column.name for column in schema if _is_numeric(column.type)]))
    return chosen, tuple(column for column in names if column not in set(chosen))


def _is_numeric(data_type: Any) -> bool:
    """Whether the values are numbers or lists of numbers."""
    import pyarrow as pa

    inner = getattr(data_type, "value_type", data_type)  # of lists and of dictionary-encoded columns
    return pa.types.is_integer(inner) or pa.types.is_floating(inner) or pa.types.is_boolean(inner)


def _validate(batch: Any, name: str, first: int, last: int) -> None:
    """Check every buffer, offset and index of a batch. Raises `InvalidData`."""
    import pyarrow as pa

    try:
        batch.validate(full=True)
    except (pa.ArrowException, ValueError) as error:
        _raise_memory_error(error)
        if "UTF8" in str(error):
            raise _not_utf8(name, first, last) from error
        raise InvalidData(
            f"{name}, rows {first} to {last}: the Arrow data is damaged: {str(error).rstrip('.')}; write it again."
        ) from error


def _unreadable(error: Exception, name: str, what: str) -> InvalidData:
    """The error for a damaged file. Raises ``error`` itself if the system caused it and not the file."""
    _raise_memory_error(error)
    if isinstance(error, OSError) and error.errno is not None:  # without errno, the compressed data is damaged
        raise error
    reason = " ".join(str(error).split()).rstrip(".")
    return InvalidData(
        f"{name} is not readable as {what}: {reason}. The file is damaged or incomplete; write it again and replace it."
    )


def _raise_memory_error(error: Exception) -> None:
    """Raise Arrow's error for a failed allocation, which is an ``ArrowException`` and a ``MemoryError``."""
    if isinstance(error, MemoryError):
        raise error


def _not_utf8(name: str, first: int, last: int, which: str = "") -> InvalidData:
    return InvalidData(
        f"{name}, rows {first} to {last} contain text that is not UTF-8{which}; write the table with UTF-8 text."
    )


def _parts(batch: Any) -> Iterator[Any]:
    """Slices of a batch with limited rows and bytes; only a single row may be larger."""
    start = 0
    while start < batch.num_rows:
        part = batch.slice(start, UNIT_ROWS)
        while part.num_rows > 1 and part.nbytes > MAX_UNIT_BYTES:
            part = part.slice(0, part.num_rows // 2)
        yield part
        start += part.num_rows


def _without_empty_fields(values: list[Any]) -> list[Any]:
    """A column without null fields.

    In a table, each object has the fields of all rows, and most of them are null. A chat template would write them, for
    example, into the arguments of a tool call.
    """
    first = next((value for value in values if value), None)
    inner = cast("list[Any]", first)[0] if isinstance(first, list) else first
    return cast("list[Any]", _dense(values)) if isinstance(inner, dict) else values


def _dense(value: Any) -> Any:
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {name: _dense(inner) for name, inner in fields.items() if inner is not None}
    return [_dense(inner) for inner in cast("list[Any]", value)] if isinstance(value, list) else value
