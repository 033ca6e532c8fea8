"""The types that server, worker, trainer and client share: spec, job, events, messages and errors.

The package is data only: frozen pydantic models, enumerations and path names. It does not open connections, start
processes or import anything heavier than pydantic.
"""
