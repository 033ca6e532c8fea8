"""Which files can be trained on, by the suffix of their name."""

TEXT_SUFFIXES = (".txt", ".text", ".md")
ROW_SUFFIXES = (".jsonl", ".parquet", ".arrow")
TOKEN_SUFFIXES = (".npy", ".bin")  # nothing but token ids
DATA_SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES, *TOKEN_SUFFIXES)
MODEL_SUFFIXES = (".tar",)


def suffixes_of(data_format: str | None, *, pretokenized: bool = False) -> tuple[str, ...]:
    """The suffixes of the files that hold data in a format of the spec; ``auto`` and ``None`` are text or rows."""
    if pretokenized or data_format == "tokens":
        return (*ROW_SUFFIXES, *TOKEN_SUFFIXES)
    return (*ROW_SUFFIXES, *TEXT_SUFFIXES) if data_format in (None, "auto", "text") else ROW_SUFFIXES
