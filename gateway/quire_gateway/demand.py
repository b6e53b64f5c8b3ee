"""How much each model is wanted: what scaling reads.

Demand = waiting + in flight + lease. The lease keeps a wake-up going for a while after the client that asked for it has
gone, so that its retry finds a warm model. Probes, `/v1/models` and `/metrics` are no demand.
"""

from collections import defaultdict
from dataclasses import dataclass

LEASE_S = 15.0


@dataclass(slots=True)
class Demand:
    """Counters of one model. Times are of the caller's monotonic clock, in seconds."""

    waiting: int = 0
    in_flight: int = 0
    lease_until: float = 0.0
    last_demand: float | None = None

    def total(self, now: float) -> int:
        return self.waiting + self.in_flight + (1 if now < self.lease_until else 0)

    def touch(self, now: float) -> None:
        self.last_demand = now

    def lease(self, now: float) -> None:
        """Called when a client leaves the queue before it was served."""
        self.lease_until = max(self.lease_until, now + LEASE_S)
        self.touch(now)


class DemandTable:
    """Demand by model key. Entries appear on first use and go with `forget`."""

    def __init__(self) -> None:
        self._demands: defaultdict[str, Demand] = defaultdict(Demand)

    def __getitem__(self, key: str) -> Demand:
        return self._demands[key]

    def forget(self, key: str) -> None:
        self._demands.pop(key, None)
