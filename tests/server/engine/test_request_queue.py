import pytest
from engine_fakes import make_request
from hypothesis import given
from hypothesis import strategies as st

from quire_server.engine.request_queue import FCFSRequestQueue, PriorityRequestQueue, RequestQueue, build_request_queue


def names(queue: RequestQueue) -> str:
    return "".join(request.request_id for request in queue)


def drain(queue: RequestQueue) -> str:
    return "".join(queue.pop().request_id for _ in range(len(queue)))


def test_fcfs_serves_in_the_order_of_coming_whatever_the_priority() -> None:
    queue = FCFSRequestQueue()
    for request_id, priority in [("a", 3), ("b", 1), ("c", 2)]:
        queue.add(make_request(request_id, priority=priority))
    assert queue.peek().request_id == "a"
    assert names(queue) == drain(queue) == "abc"


def test_fcfs_puts_a_preempted_request_before_all() -> None:
    queue = FCFSRequestQueue()
    queue.add(make_request("a"))
    queue.prepend(make_request("b"))
    queue.prepend(make_request("c"))
    assert drain(queue) == "cba"


def test_priority_serves_the_lowest_number_then_the_earliest_then_the_first_to_come() -> None:
    queue = PriorityRequestQueue()
    for request_id, priority, arrival_time in [
        ("a", 1, 5.0),
        ("b", 0, 9.0),
        ("c", 1, 4.0),
        ("d", 1, 5.0),
        ("e", -1, 9.0),
    ]:
        queue.add(make_request(request_id, priority=priority, arrival_time=arrival_time))
    assert queue.peek().request_id == "e"
    assert names(queue) == drain(queue) == "ebcad"


def test_priority_puts_a_preempted_request_before_its_equals_alone() -> None:
    queue = PriorityRequestQueue()
    queue.add(make_request("a", priority=0))
    queue.add(make_request("b", priority=1))
    queue.prepend(make_request("c", priority=1))
    assert drain(queue) == "acb"


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_request_can_leave_from_anywhere(policy) -> None:
    queue = build_request_queue(policy)
    requests = [make_request(request_id) for request_id in "abcd"]
    for request in requests:
        queue.add(request)
    for index in (1, 0, 3):
        queue.remove(requests[index])
    assert (len(queue), names(queue)) == (1, "c")


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()), max_size=20),
    st.lists(st.integers(0, 19), max_size=8),
)
def test_priority_order_is_that_of_a_sort(added: list[tuple[int, int, bool]], removed: list[int]) -> None:
    queue = PriorityRequestQueue()
    model = []
    for number, (priority, arrival_time, is_prepended) in enumerate(added):
        request = make_request(chr(97 + number), priority=priority, arrival_time=arrival_time)
        (queue.prepend if is_prepended else queue.add)(request)
        model.append(((priority, arrival_time, -number if is_prepended else number), request))
    for number in sorted({number for number in removed if number < len(model)}, reverse=True):
        queue.remove(model.pop(number)[1])
    model.sort(key=lambda entry: entry[0])
    assert names(queue) == drain(queue) == "".join(request.request_id for _, request in model)
