"""Files of training data: their types, their first bytes, and the ones of a folder that are used."""
