"""One attempt of a job on this worker: prepared, run, published, ended."""
