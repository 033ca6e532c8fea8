"""Data, from the sources of a spec to the sequences of a step: rows, tokens in one cached file, packing, order."""
