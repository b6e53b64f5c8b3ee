"""The order in which waiting requests are admitted.

Owns the order and nothing else: it neither reads nor writes a request's state. A request is in a queue at most once.
"""

import bisect
from collections import OrderedDict
from collections.abc import Iterator
from itertools import count
from typing import Protocol

from quire_server.config import SchedulingPolicy
from quire_server.engine.request import Request


class RequestQueue(Protocol):
    """What the scheduler asks of a queue. `peek` and `pop` need a queue that is not empty."""

    def add(self, request: Request) -> None: ...

    def prepend(self, request: Request) -> None:
        """Add a preempted request: before everything that its policy holds to be its equal."""
        ...

    def peek(self) -> Request: ...

    def pop(self) -> Request: ...

    def remove(self, request: Request) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]:
        """Iterate in the order of admission."""
        ...


class FCFSRequestQueue:
    """First come, first served. Every operation is O(1)."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def add(self, request: Request) -> None:
        self._requests[request.request_id] = request

    def prepend(self, request: Request) -> None:
        self.add(request)
        self._requests.move_to_end(request.request_id, last=False)

    def peek(self) -> Request:
        return next(iter(self._requests.values()))

    def pop(self) -> Request:
        return self._requests.popitem(last=False)[1]

    def remove(self, request: Request) -> None:
        del self._requests[request.request_id]

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())


_Rank = tuple[int, float, int]
"""Priority, arrival time, and a number that keeps equals in the order in which they came."""


class PriorityRequestQueue:
    """Lowest (priority, arrival time) first; equals in the order in which they came.

    A sorted list: binary search to find a place, one memory move to make it. A request can leave from the middle
    without leaving anything behind, which a heap cannot do.
    """

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._rank_to_request: dict[_Rank, Request] = {}
        self._id_to_rank: dict[str, _Rank] = {}
        self._counter = count(1)

    def add(self, request: Request) -> None:
        self._insert(request, next(self._counter))

    def prepend(self, request: Request) -> None:
        self._insert(request, -next(self._counter))

    def peek(self) -> Request:
        return self._rank_to_request[self._ranks[0]]

    def pop(self) -> Request:
        request = self.peek()
        self.remove(request)
        return request

    def remove(self, request: Request) -> None:
        rank = self._id_to_rank.pop(request.request_id)
        del self._rank_to_request[rank]
        del self._ranks[bisect.bisect_left(self._ranks, rank)]

    def __len__(self) -> int:
        return len(self._ranks)

    def __iter__(self) -> Iterator[Request]:
        return (self._rank_to_request[rank] for rank in self._ranks)

    def _insert(self, request: Request, number: int) -> None:
        rank = (request.priority, request.arrival_time, number)
        bisect.insort(self._ranks, rank)
        self._rank_to_request[rank] = request
        self._id_to_rank[request.request_id] = rank


def build_request_queue(policy: SchedulingPolicy) -> RequestQueue:
    return PriorityRequestQueue() if policy == "priority" else FCFSRequestQueue()
