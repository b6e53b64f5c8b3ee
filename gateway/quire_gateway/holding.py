"""The bounded queue in front of a cold model: a request waits here until a replica is ready, or time is up."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from quire_gateway import errors
from quire_gateway.backends import Backends, Model
from quire_gateway.demand import DemandTable

SHORTEST_RETRY_AFTER_S = 1
DEFAULT_RETRY_AFTER_S = 10
AWAY_PAUSE_S = 0.5
"""Until replicas are asked again that are said to be ready and are not there."""


def retry_after(model: Model) -> int:
    """Whole seconds until it is worth asking again: the time the model still needs, where that is known."""
    eta = model.eta_seconds
    return DEFAULT_RETRY_AFTER_S if eta is None else max(SHORTEST_RETRY_AFTER_S, round(eta))


def _not_ready(model: Model) -> errors.GatewayError:
    away = "its replicas take no requests just now"
    return errors.model_loading(
        model.name, model.status or (away if model.backends else model.phase), retry_after(model)
    )


class Holder:
    """Holds requests for cold models. Invariant: `waiting` of a model counts exactly the open `hold` calls for it."""

    def __init__(self, backends: Backends, demands: DemandTable) -> None:
        self._backends = backends
        self._demands = demands

    def admit(self, model: Model) -> None:
        """Refuse a request that must not or cannot wait.

        Raises:
            GatewayError: suspended, cold with `coldStart: Reject`, or the queue is full.
        """
        if model.is_suspended:
            raise errors.model_suspended(model.name)
        if not model.backends:
            self.admit_to_queue(model)

    def admit_to_queue(self, model: Model) -> None:
        """Refuse a request for which there is no replica now, and that must not or cannot wait for one.

        Raises:
            GatewayError: `coldStart: Reject`, or the queue is full.
        """
        if model.cold_start == "Reject":
            self._demands[model.key].lease(asyncio.get_running_loop().time())  # it wakes for the retry
            raise _not_ready(model)
        waiting = self._demands[model.key].waiting
        if waiting >= model.max_queue:
            raise errors.queue_full(model.name, waiting, retry_after(model))

    async def hold(self, key: str, *, since: float, away: Model | None = None) -> AsyncGenerator[Model]:
        """Yield the model at once and at every heartbeat while it is cold; end when a replica is ready.

        Close the iterator (`contextlib.aclosing`) to leave the queue.

        Args:
            since: when the client began to wait, by the event loop's clock.
            away: the model as it was when none of its replicas would take the request. Unless it changes, they are
                asked again after a pause.

        Raises:
            GatewayError: it was suspended or deleted meanwhile, or `coldStartTimeout` has passed.
        """
        loop = asyncio.get_running_loop()
        demand = self._demands[key]
        demand.waiting += 1
        demand.touch(loop.time())
        is_served = False
        try:
            next_beat = loop.time()
            pause_end = loop.time() + AWAY_PAUSE_S
            while not (model := self._current(key)).backends or (model is away and loop.time() < pause_end):
                left = since + model.cold_start_timeout_s - loop.time()
                if left <= 0:
                    raise _not_ready(model)
                if loop.time() >= next_beat:
                    next_beat = loop.time() + model.heartbeat_s
                    demand.touch(loop.time())
                    yield model  # what changes while a slow client takes this, `changed` tells at once
                until = min(since + model.cold_start_timeout_s, next_beat, *([pause_end] if model.backends else []))
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        await self._backends.changed(key, model)
            is_served = True
        finally:
            demand.waiting -= 1
            if not is_served:
                demand.lease(loop.time())

    def _current(self, key: str) -> Model:
        model = self._backends.get(key)
        if model is None:
            raise errors.model_not_found(key)
        if model.is_suspended:
            raise errors.model_suspended(model.name)
        return model
