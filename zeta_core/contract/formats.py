"""Which files can be trained on, by the ending of their name."""

TEXT_SUFFIXES = (".txt", ".text", ".md")
ROW_SUFFIXES = (".jsonl", ".parquet", ".arrow")
TOKEN_SUFFIXES = (".npy", ".bin")  # nothing but token ids
DATA_SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES, *TOKEN_SUFFIXES)
MODEL_SUFFIXES = (".tar",)
