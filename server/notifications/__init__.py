"""Sends the stored messages to webhooks, URLs and e-mail addresses, and repeats those that fail."""
