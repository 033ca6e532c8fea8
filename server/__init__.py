"""The server: HTTP API, scheduler and event storage. It is the only writer of the database."""
