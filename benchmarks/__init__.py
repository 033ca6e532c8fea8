"""How fast it is, against the peers, in the same run: one file for each question.

``make bench`` (or ``python -m benchmarks [NAME...]``) asks them all and prints one table. Ours and the peers do the
same work in turns, several rounds of it, so that a machine that is busy for a while is busy for both; what is compared
are medians, and the ratio is the median of the rounds' ratios. Nothing here is shipped or imported by a room.
"""
