"""How the capacity for messages is shared between receivers, destinations and projects."""

from server.notifications.sending_capacity import (
    MAX_FAILING_PER_PROJECT,
    MAX_PER_DESTINATION,
    MAX_PER_PROJECT,
    MAX_SENDING,
    Destination,
    Due,
    SendingCapacity,
)


def due(project: str, number: int, host: str = "") -> Due:
    return Due(f"{project}-{number}", Destination(project, host or f"host-{number}.example"))


def start(capacity: SendingCapacity, messages: list[Due]) -> list[Due]:
    """Take capacity for as many of the messages as possible."""
    chosen = list(capacity.choose(messages))
    for message in chosen:
        capacity.take(message.id, message.destination)
    return chosen


def test_one_host_gets_few_messages_of_a_project_at_a_time() -> None:
    capacity = SendingCapacity()
    assert len(start(capacity, [due("a", number, "dead.example") for number in range(16)])) == MAX_PER_DESTINATION
    assert start(capacity, [due("a", 99, "alive.example")]) != []
    assert start(capacity, [due("b", 99, "dead.example")]) != [], "the destinations of projects are counted apart"


def test_receivers_that_failed_leave_capacity_for_others() -> None:
    """Many hosts that don't respond delay the other messages of their project only once."""
    capacity = SendingCapacity()
    dead = [due("a", number) for number in range(40)]
    first = start(capacity, dead)
    assert len(first) == MAX_PER_PROJECT
    for message in first:
        capacity.release(message.id, failed=True)
    again = start(capacity, first)
    assert len(again) == MAX_FAILING_PER_PROJECT
    alive = start(capacity, [due("a", number) for number in range(100, 110)])
    assert len(alive) == MAX_PER_PROJECT - MAX_FAILING_PER_PROJECT
    capacity.release(again[0].id, failed=False)
    assert len(start(capacity, [again[0]])) == 1, "a receiver that responds again is one like the others"


def test_projects_with_dead_receivers_leave_capacity_for_other_projects() -> None:
    capacity = SendingCapacity()
    for project in "abcdefgh":
        dead = [due(project, number) for number in range(16)]
        for message in start(capacity, dead):
            capacity.release(message.id, failed=True)
        start(capacity, dead)
    assert capacity.num_free >= MAX_SENDING // 2
    assert start(capacity, [due("z", 1)]) != []
