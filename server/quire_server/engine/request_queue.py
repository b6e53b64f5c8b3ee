"""The order in which waiting requests are admitted.

Owns the order and nothing else: it does not write to a request. A request is in a queue at most once. Its place depends
on what never changes of it, so that one that comes back after a preemption or a wait finds the place that it had.
"""

import bisect
from collections.abc import Callable, Iterator

from quire_contract.flags.table import SchedulingPolicy
from quire_server.engine.request import Request

Rank = tuple[int, float, int]
"""What a policy goes by; the lowest is first. No two requests have the same."""


def rank_by(policy: SchedulingPolicy) -> Callable[[Request], Rank]:
    """Return how a policy ranks requests.

    fcfs: in the order in which they were added. priority: lowest (priority, arrival time) first, then as added.
    """
    if policy == "fcfs":
        return lambda request: (0, 0.0, request.sequence_number)
    return lambda request: (request.priority, request.arrival_time, request.sequence_number)


class RequestQueue:
    """Requests in the order of their ranks.

    A sorted list: binary search to find a place, one memory move to make it. A request can leave from the middle
    without leaving anything behind, which a heap cannot do. `peek` and `pop` need a queue that is not empty.
    """

    def __init__(self, rank: Callable[[Request], Rank]) -> None:
        self._rank = rank
        self._ranks: list[Rank] = []
        self._rank_to_request: dict[Rank, Request] = {}

    def add(self, request: Request) -> None:
        rank = self._rank(request)
        bisect.insort(self._ranks, rank)
        self._rank_to_request[rank] = request

    def peek(self) -> Request:
        return self._rank_to_request[self._ranks[0]]

    def pop(self) -> Request:
        return self._rank_to_request.pop(self._ranks.pop(0))

    def remove(self, request: Request) -> None:
        rank = self._rank(request)
        del self._rank_to_request[rank]
        del self._ranks[bisect.bisect_left(self._ranks, rank)]

    def __len__(self) -> int:
        return len(self._ranks)

    def __iter__(self) -> Iterator[Request]:
        """Iterate in the order of admission."""
        return (self._rank_to_request[rank] for rank in self._ranks)
