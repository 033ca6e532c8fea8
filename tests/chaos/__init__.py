"""The fault suite: jobs on a real fleet, random faults, and a check of every promise at the end.

``make chaos`` runs `suite` with 100 jobs, ``make test-all`` runs a short form of it (`test_suite`).
"""
