"""The tests. Folders mirror the packages, and the tests use real services, processes and files."""
