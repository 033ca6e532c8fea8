"""The training core: one loop on Accelerate, started by ``zeta.Trainer`` or by ``python -m zeta_core RUN_DIR``.

Importing this package imports nothing heavy; torch is loaded by the modules that train.
"""
