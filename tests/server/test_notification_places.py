"""How the places for messages are shared between receivers, destinations and projects."""

from server.notifications.places import (
    MAX_FAILING_PER_PROJECT,
    MAX_PER_DESTINATION,
    MAX_PER_PROJECT,
    MAX_SENDING,
    Destination,
    Due,
    Places,
)


def due(project: str, number: int, host: str = "") -> Due:
    return Due(f"{project}-{number}", Destination(project, host or f"host-{number}.example"))


def start(places: Places, messages: list[Due]) -> list[Due]:
    """Take places for as many of the messages as possible."""
    chosen = list(places.choose(messages))
    for message in chosen:
        places.take(message.id, message.destination)
    return chosen


def test_one_host_gets_few_messages_of_a_project_at_a_time() -> None:
    places = Places()
    assert len(start(places, [due("a", number, "dead.example") for number in range(16)])) == MAX_PER_DESTINATION
    assert start(places, [due("a", 99, "alive.example")]) != []
    assert start(places, [due("b", 99, "dead.example")]) != [], "the destinations of projects are counted apart"


def test_receivers_that_failed_leave_places_for_others() -> None:
    """Many hosts that don't respond delay the other messages of their project only once."""
    places = Places()
    dead = [due("a", number) for number in range(40)]
    first = start(places, dead)
    assert len(first) == MAX_PER_PROJECT
    for message in first:
        places.release(message.id, failed=True)
    again = start(places, first)
    assert len(again) == MAX_FAILING_PER_PROJECT
    alive = start(places, [due("a", number) for number in range(100, 110)])
    assert len(alive) == MAX_PER_PROJECT - MAX_FAILING_PER_PROJECT
    places.release(again[0].id, failed=False)
    assert len(start(places, [again[0]])) == 1, "a receiver that responds again is one like the others"


def test_projects_with_dead_receivers_leave_places_for_other_projects() -> None:
    places = Places()
    for project in "abcdefgh":
        dead = [due(project, number) for number in range(16)]
        for message in start(places, dead):
            places.release(message.id, failed=True)
        start(places, dead)
    assert places.num_free >= MAX_SENDING // 2
    assert start(places, [due("z", 1)]) != []
