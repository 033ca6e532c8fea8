"""`zeta backup` and `zeta restore`: copying the database and the artifacts, consistent with each other."""
