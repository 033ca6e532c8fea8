"""Evaluating a checkpoint on the documents of a file: ``python -m zeta_core evaluate RUN_DIR``."""
