"""What server, worker and training exchange: signed messages, and the files of a run directory."""
