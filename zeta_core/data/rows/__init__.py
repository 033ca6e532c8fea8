"""Stage 2, rows: reading the rows of a file, and their values under the names that a format defines.

Readers yield `Unit` objects of `Row` objects (`row`): `text_files` (text and JSON Lines), `json_documents`,
`csv_files` and `tables` (Parquet and Arrow); `decompression` decompresses their files. `columns` detects the
`Layout` of rows: a format (`formats`), or a well-known shape that is converted to one (`shapes`). `turns` reads the
turns of conversations, and `token_rows` rows of token ids.
"""
