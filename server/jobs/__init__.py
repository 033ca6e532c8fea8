"""Jobs that are there: read, commanded, followed, deleted, and what they have stored."""
