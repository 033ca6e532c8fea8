"""Shares the capacity for messages that are being sent between targets, destinations and projects.

A target is a webhook or a URL, and gets one message at a time. A destination is a host, or the mail server, as one
project uses it. Destinations whose last message failed share a part of the capacity, so receivers that don't respond
can't occupy all of it: the other messages of their project, and those of other projects, are sent meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

MAX_SENDING = 64
MAX_PER_PROJECT = 16
MAX_PER_DESTINATION = 4
MAX_FAILING = 32  # to destinations whose last message failed
MAX_FAILING_PER_PROJECT = 8
MAX_REMEMBERED = 10_000  # failing destinations; the oldest ones are forgotten
EMAIL = "e-mail"  # the destination of all e-mails


@dataclass(frozen=True)
class Destination:
    project: str
    host: str

    @classmethod
    def of(cls, project: str, url: str, format: str) -> Destination:
        return cls(project, EMAIL if format == "email" else (urlsplit(url).hostname or "").lower())


@dataclass(frozen=True)
class Due:
    """A message that may be sent now."""

    id: str
    destination: Destination


class SendingCapacity:
    """The capacity of one server process."""

    def __init__(self) -> None:
        self._sending: dict[str, Destination] = {}  # by target
        self._failing: dict[Destination, None] = {}  # the one that failed last is the last one

    @property
    def targets(self) -> list[str]:
        """The targets to which a message is being sent."""
        return list(self._sending)

    @property
    def num_free(self) -> int:
        return MAX_SENDING - len(self._sending)

    def take(self, target: str, destination: Destination) -> None:
        """Note that a message is being sent."""
        self._sending[target] = destination

    def release(self, target: str, *, failed: bool) -> None:
        """Note that the message was sent, or that it failed."""
        destination = self._sending.pop(target, None)
        if destination is None:
            return
        self._failing.pop(destination, None)
        if failed:
            self._failing[destination] = None
            if len(self._failing) > MAX_REMEMBERED:
                del self._failing[next(iter(self._failing))]

    def choose(self, due: Iterable[Due]) -> Iterator[Due]:
        """The messages for which there is capacity, in their order."""
        used = list(self._sending.values())
        for message in due:
            if len(used) >= MAX_SENDING:
                return
            if self._fits(message.destination, used):
                used.append(message.destination)
                yield message

    def _fits(self, destination: Destination, used: list[Destination]) -> bool:
        if used.count(destination) >= MAX_PER_DESTINATION:
            return False
        if sum(one.project == destination.project for one in used) >= MAX_PER_PROJECT:
            return False
        if destination not in self._failing:
            return True
        failing = Counter(one.project for one in used if one in self._failing)
        return failing[destination.project] < MAX_FAILING_PER_PROJECT and failing.total() < MAX_FAILING
