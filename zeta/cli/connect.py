"""From what was typed to a client and a job's full id."""

from __future__ import annotations

from zeta.client import Client
from zeta_core.contract.errors import InvalidRequest, NotFound
from zeta_core.contract.identifiers import ID_CHARACTERS, is_id

LAST = "@last"


def full_id(client: Client, text: str) -> str:
    """The id of the one job that ``text`` means: a full id, the beginning of one (with or without ``job_``), `LAST`.

    Raises `NotFound` where it fits none and `InvalidRequest` where it fits several.
    """
    if is_id(text, "job") and len(text) == len("job_") + ID_CHARACTERS:
        return text
    if text == LAST:
        newest = client.jobs(limit=1)
        if not newest:
            raise NotFound("There is no job yet, so none is @last; submit one with `zeta submit`.")
        return newest[0].id
    beginning = text if text.startswith("job_") else f"job_{text}"
    found = [job.id for job in client.jobs(limit=None) if job.id.startswith(beginning)] if text else []
    if not found:
        raise NotFound(f"No job's id begins with {text!r}; `zeta jobs` lists them.")
    if len(found) > 1:
        shown = ", ".join(found[:3]) + (" ..." if len(found) > 3 else "")
        raise InvalidRequest(f"{len(found)} jobs' ids begin with {text!r} ({shown}); write more of it.")
    return found[0]
