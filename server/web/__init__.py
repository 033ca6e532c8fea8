"""The dashboard: pages rendered on the server, for browsers that logged in with an API key."""
