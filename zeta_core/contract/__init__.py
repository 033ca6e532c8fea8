"""The words that server, worker, trainer and client share: spec, job, events, messages, errors.

Everything here is data: frozen pydantic models, closed lists and path names. Nothing here opens a connection,
starts a process or imports anything heavier than pydantic.
"""
