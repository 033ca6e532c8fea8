"""What server, worker and run exchange: signed messages, and the files of a run directory."""
