import pytest
from engine_fakes import make_request
from hypothesis import given
from hypothesis import strategies as st

from quire_server.engine.request import Request
from quire_server.engine.request_queue import RequestQueue, rank_by
from quire_server.shared.config import SchedulingPolicy


def make_queued(request_id: str, sequence_number: int, **kwargs: object) -> Request:
    request = make_request(request_id, **kwargs)
    request.sequence_number = sequence_number
    return request


def names(queue: RequestQueue) -> str:
    return "".join(request.request_id for request in queue)


def drain(queue: RequestQueue) -> str:
    return "".join(queue.pop().request_id for _ in range(len(queue)))


def test_fcfs_serves_in_the_order_of_coming_whatever_the_priority() -> None:
    queue = RequestQueue(rank_by("fcfs"))
    for number, (request_id, priority) in enumerate([("a", 3), ("b", 1), ("c", 2)]):
        queue.add(make_queued(request_id, number, priority=priority))
    assert queue.peek().request_id == "a"
    assert names(queue) == drain(queue) == "abc"


def test_priority_serves_the_lowest_number_then_the_earliest_then_the_first_to_come() -> None:
    queue = RequestQueue(rank_by("priority"))
    for number, (request_id, priority, arrival_time) in enumerate(
        [("a", 1, 5.0), ("b", 0, 9.0), ("c", 1, 4.0), ("d", 1, 5.0), ("e", -1, 9.0)]
    ):
        queue.add(make_queued(request_id, number, priority=priority, arrival_time=arrival_time))
    assert queue.peek().request_id == "e"
    assert names(queue) == drain(queue) == "ebcad"


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_who_comes_back_finds_the_place_that_it_had(policy: SchedulingPolicy) -> None:
    queue = RequestQueue(rank_by(policy))
    requests = [make_queued(request_id, number) for number, request_id in enumerate("abcd")]
    for request in (requests[3], requests[1], requests[0]):
        queue.add(request)
    queue.pop()
    queue.add(requests[2])
    queue.add(requests[0])
    assert drain(queue) == "abcd"


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_request_can_leave_from_anywhere(policy: SchedulingPolicy) -> None:
    queue = RequestQueue(rank_by(policy))
    requests = [make_queued(request_id, number) for number, request_id in enumerate("abcd")]
    for request in requests:
        queue.add(request)
    for index in (1, 0, 3):
        queue.remove(requests[index])
    assert (len(queue), names(queue)) == (1, "c")


@given(
    st.sampled_from(["fcfs", "priority"]),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=20).flatmap(
        lambda added: st.tuples(st.just(added), st.permutations(range(len(added))))
    ),
    st.lists(st.integers(0, 19), max_size=8),
)
def test_the_order_is_that_of_a_sort(
    policy: SchedulingPolicy, added: tuple[list[tuple[int, int]], list[int]], removed: list[int]
) -> None:
    queue = RequestQueue(rank_by(policy))
    model = []
    for number in added[1]:
        priority, arrival_time = added[0][number]
        request = make_queued(chr(97 + number), number, priority=priority, arrival_time=arrival_time)
        queue.add(request)
        model.append(((priority, arrival_time, number) if policy == "priority" else number, request))
    for number in sorted({number for number in removed if number < len(model)}, reverse=True):
        queue.remove(model.pop(number)[1])
    model.sort(key=lambda entry: entry[0])
    assert names(queue) == drain(queue) == "".join(request.request_id for _, request in model)
