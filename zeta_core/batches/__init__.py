"""Answering the requests of a file: ``python -m zeta_core batch RUN_DIR``."""
