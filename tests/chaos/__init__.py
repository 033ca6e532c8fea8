"""The fault suite: jobs on a real fleet, faults struck at random, and every promise checked at the end.

``make chaos`` runs `storm` with 100 jobs, ``make test`` a short form of it (`test_storm`).
"""
