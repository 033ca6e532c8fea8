"""Answering requests from a free slot: one process per loaded model, which ends when a job needs its slot."""
