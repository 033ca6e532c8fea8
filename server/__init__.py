"""The service's server: HTTP API, scheduler, and keeper of the events. The only writer of the database."""
