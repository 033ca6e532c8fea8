"""One attempt of a job on this worker: preparing it, running it, publishing its journal, and ending it."""
