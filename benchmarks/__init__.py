"""Benchmarks against other training libraries, one module per benchmark.

``make bench`` (or ``python -m benchmarks [NAME...]``) runs all of them and prints one table. Within one run, the
contestants do the same work in turns, in several rounds, so that other load on the machine affects all of them equally.
Each figure is a median, and the ratio is the median of the ratios of the rounds. No other package imports this one, and
the wheel does not contain it.
"""
