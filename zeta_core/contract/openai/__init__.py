"""Requests and responses in the formats of OpenAI, which the server and batch jobs share."""
