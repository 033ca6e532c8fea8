"""Stage 4, tokens: encoding the documents of all sources as one cached, memory-mapped file of token ids.

`cache` is the entry point. It writes what `encoder` yields for each unit of rows (in the processes of
`parallel_encoding`) and what `statistics` collects about it, and returns a `TokenFile`. `flat_files` maps flat files of
ids without a copy. `held_out` divides a token file into training and evaluation data, and `end_tokens` finds the tokens
that end its documents.
"""

from zeta_core.data.tokens.cache import prepare_tokens
from zeta_core.data.tokens.token_file import WHOLE_FORMATS, Mix, Origin, TokenFile

__all__ = ["WHOLE_FORMATS", "Mix", "Origin", "TokenFile", "prepare_tokens"]
