"""The real parts that tests run on: a Valkey server, a PostgreSQL server, processes, and waiting for what they do."""
