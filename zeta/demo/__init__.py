"""``python -m zeta.demo``, which `make demo` runs: the whole workflow on this machine."""
