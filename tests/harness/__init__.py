"""Tools for the tests: real servers and processes, faulty networks, disks and clocks, and waiting for conditions."""
